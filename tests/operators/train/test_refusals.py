"""What no training can do is refused while the configuration is read, with keys, values and cure."""

import pytest
from pydantic import ValidationError

from operators.train.config import TrainConfig
from operators.train.lora import LoraConfig

SHARED = {"num_workers": 4, "sequence_parallel": 2}
HYPER = {"attention": "hyper_attention"}


def test_workers_that_share_packs_divide_all_workers():
    assert TrainConfig(**SHARED).sequence_parallel == 2
    with pytest.raises(ValidationError, match="sequence_parallel: 2 does not divide num_workers: 3; choose a divisor"):
        TrainConfig(num_workers=3, sequence_parallel=2)


def test_workers_that_share_packs_are_not_elastic():
    with pytest.raises(ValidationError, match=r"sequence_parallel: 2 with min_workers: 2, .* set min_workers: 0"):
        TrainConfig(**SHARED, min_workers=2)
    TrainConfig(**SHARED, min_workers=4)


def test_dropout_cannot_be_shared():
    TrainConfig(**SHARED, lora=LoraConfig(r=4))
    with pytest.raises(ValidationError, match=r"sequence_parallel: 2 with lora\.dropout: 0\.1"):
        TrainConfig(**SHARED, lora=LoraConfig(r=4, dropout=0.1))


@pytest.mark.parametrize("sizes", [{"mode": "paper"}, {"choice": "lsh"}, {"segment": 0}])
def test_draws_that_depend_on_the_number_of_a_head_cannot_be_shared(sizes):
    with pytest.raises(ValidationError, match="whose draws depend on the number of a head"):
        TrainConfig(**SHARED, **HYPER, hyper_attention=sizes)
    TrainConfig(**HYPER, hyper_attention=sizes)


def test_attention_without_such_draws_can():
    for sizes in ({}, {"choice": "means"}, {"choice": "lsh", "lookback": 0}):
        TrainConfig(**SHARED, **HYPER, hyper_attention=sizes)


def test_sharing_packs_changes_no_result():
    plain = TrainConfig(num_workers=4)
    assert TrainConfig(**SHARED).identity() == plain.identity()
    assert TrainConfig(**SHARED).run_identity("digest", "student") == plain.run_identity("digest", "student")


def test_sharded_weights_are_not_compiled():
    with pytest.raises(ValidationError, match="compile: true with zero_stage: 3"):
        TrainConfig(compile=True, zero_stage=3)
