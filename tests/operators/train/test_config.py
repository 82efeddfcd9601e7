"""The learning rate, identity, limits and precision that follow from the training configuration alone."""

import pytest
from pydantic import ValidationError

from operators.train.config import TrainConfig


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [config.learning_rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert config.learning_rate_at(0, 1) > 0


@pytest.mark.parametrize(
    ("schedule", "middle", "late"),
    [("cosine", 0.5, 0.0245), ("linear", 0.5, 0.1), ("wsd", 1.0, 0.5), ("constant", 1.0, 1.0)],
)
def test_each_schedule_falls_as_it_says(schedule, middle, late):
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0, schedule=schedule)
    rates = [config.learning_rate_at(step, 1000) for step in range(1000)]
    assert rates[500] == pytest.approx(middle)
    assert rates[900] == pytest.approx(late, rel=0.01)
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)


def test_resources_do_not_change_the_identity_but_the_recipe_does():
    base = TrainConfig().run_identity("digest", "student")
    assert TrainConfig(num_workers=7, zero_stage=3).run_identity("digest", "student") == base
    assert TrainConfig(neftune_alpha=10).run_identity("digest", "student") != base
    assert TrainConfig(examples_per_step=128).run_identity("digest", "student") != base
    assert TrainConfig().run_identity("other", "student") != base


def test_an_absurd_configuration_is_refused():
    for key, value in {"zero_stage": 4, "num_workers": 0, "neftune_alpha": -1, "attention": "magic"}.items():
        with pytest.raises(ValidationError, match=key):
            TrainConfig.model_validate({key: value})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_accumulated_in_fp32_whatever_the_stage(precision, stage):
    config = TrainConfig(precision=precision, zero_stage=stage, num_workers=2)
    used = config.deepspeed()["zero_optimization"]["stage"]
    assert used == config.sharding
    assert used == (max(stage, 1) if precision == "bf16" else stage)  # DeepSpeed refuses the rest


def test_a_worker_alone_on_cpus_copies_gradients_once_a_step_and_its_checkpoints_stay_those_of_the_stage():
    config = TrainConfig(precision="fp32", num_workers=1)
    assert config.deepspeed()["zero_optimization"]["stage"] == 1
    assert config.sharding == 2
    assert TrainConfig(num_workers=1, gpus_per_worker=1).deepspeed()["zero_optimization"]["stage"] == 2
