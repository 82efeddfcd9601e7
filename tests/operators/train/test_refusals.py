"""What no training can do is refused while the configuration is read, with keys, values and cure."""

import pytest
from pydantic import ValidationError

from operators.train.config import TrainConfig
from operators.train.lora import LoraConfig
from operators.train.refusals import unused

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


@pytest.mark.parametrize(
    ("keys", "need"),
    [
        ({"hyper_attention": {"window": 64}}, "hyper_attention: .* without attention: hyper_attention; .*={}"),
        ({"hyper_attention_layers": "even"}, "hyper_attention_layers: even .* without attention: hyper_attention"),
        ({"neftune_alpha": 0, "neftune_noise": "gaussian"}, "neftune_noise: gaussian .* without neftune_alpha above 0"),
        ({"muon_rate_factor": 4}, "muon_rate_factor: 4.0 .* without optimizer: muon; .* by train.muon_rate_factor=10"),
    ],
)
def test_keys_without_effect_are_refused(keys, need):
    with pytest.raises(ValidationError, match=need):
        TrainConfig(**keys)


def test_defaults_that_are_written_down_are_not_refused():
    keys = {"hyper_attention": {}, "hyper_attention_layers": "all", "neftune_noise": "uniform", "muon_rate_factor": 10}
    config = TrainConfig(**keys, neftune_alpha=0)
    assert unused(config) == []
    assert TrainConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"epochs": 3, "max_steps": 6}, "train.epochs: 3 is not used; train.max_steps: 6 rules"),
        (
            {"packs_per_step": 4, "tokens_per_step": 9},
            "train.packs_per_step: 4 is not used; train.tokens_per_step: 9 rules",
        ),
        (
            {"packs_per_step": 4, "examples_per_step": 9},
            "train.packs_per_step: 4 is not used; train.examples_per_step: 9 rules",
        ),
        ({"validation_share": 0.1}, "train.validation_share: 0.1 is not used; train.evaluate_every_steps: 0 rules"),
        (
            {"max_grad_norm": 2, "optimizer": "muon"},
            "train.max_grad_norm: 2.0 is not used; train.optimizer: muon rules",
        ),
    ],
)
def test_a_key_that_another_one_overrules_is_told_and_not_refused(keys, told):
    config = TrainConfig(**keys)
    assert [str(finding) for finding in unused(config)] == [told]
    assert not any(finding.fatal for finding in unused(config))


def test_keys_that_are_not_given_are_not_told():
    assert unused(TrainConfig(max_steps=6, examples_per_step=4, optimizer="muon")) == []


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_an_elastic_training_has_an_optimizer_that_can_go_on_with_fewer_workers(optimizer):
    elastic = {"num_workers": 8, "min_workers": 4}
    with pytest.raises(ValidationError, match=f"min_workers: 4 with optimizer: {optimizer}, .* set optimizer: adamw"):
        TrainConfig(**elastic, optimizer=optimizer)
    TrainConfig(**elastic)
    TrainConfig(**elastic, optimizer=optimizer, zero_stage=0, precision="fp32")  # every worker has the whole state
    TrainConfig(num_workers=8, min_workers=8, optimizer=optimizer)


def test_workers_do_not_share_a_gpu():
    TrainConfig(gpus_per_worker=0.5)
    with pytest.raises(ValidationError, match=r"gpus_per_worker: 0\.5 with num_workers: 2, .* set gpus_per_worker: 1"):
        TrainConfig(gpus_per_worker=0.5, num_workers=2)


def test_an_optimizer_on_the_host_with_one_thread_is_told():
    keys = {"offload": "optimizer", "gpus_per_worker": 1}
    [finding] = unused(TrainConfig(**keys))
    assert str(finding).startswith("train.offload: optimizer with cpus_per_worker: 1 and threads_per_worker: 0, so one")
    assert not finding.fatal
    assert len(unused(TrainConfig(**keys, cpus_per_worker=16, threads_per_worker=1))) == 1
    for enough in ({"cpus_per_worker": 16}, {"threads_per_worker": 8}, {"gpus_per_worker": 0}, {"offload": "none"}):
        assert unused(TrainConfig(**keys | enough)) == []
