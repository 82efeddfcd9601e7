"""What is offloaded reaches DeepSpeed, whose curve stays the same; what cannot be offloaded is refused."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from operators.train import memory
from operators.train.checkpoint import newest_good
from operators.train.config import TrainConfig
from operators.train.engine import loaded
from operators.train.pack_order import PackStore
from operators.train.saving import save_checkpoint
from operators.train.trainer import Trainer
from operators.train.zero import bucket_elements, zero_settings

CONFIG = TrainConfig(num_workers=2, max_steps=4, packs_per_step=3, precision="fp32", learning_rate=1e-3)


def steps(job, start=0, save=None, saved=None, **changes):
    """Losses of the steps up to the fourth, or of the first two if they end with a checkpoint; and the engine."""
    one = replace(job, config=CONFIG.model_copy(update={"num_workers": 1, **changes}))
    checkpoint = newest_good(saved, one.spec)[0] if saved else None
    with loaded(one, checkpoint) as (engine, noise):
        trainer = Trainer(one, engine, noise, PackStore(one.files))
        losses = [trainer.step(step).loss for step in range(start, 2 if save else 4)]
        if save:
            save_checkpoint(engine, save, 2, one.spec)
        return losses, engine


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer_and_weights")])
def test_the_curve_is_the_same_with_and_without(job, stage, offload, tmp_path):
    expected, _ = steps(job, zero_stage=stage)
    found, engine = steps(job, zero_stage=stage, offload=offload)
    assert found == pytest.approx(expected, rel=1e-6)
    assert engine.zero_reduce_bucket_size() == memory.measure(job.student, job.config.lora).parameters
    assert engine.zero_offload_optimizer().device == "cpu"
    assert (engine.zero_offload_param() is not None) == (offload == "optimizer_and_weights")
    assert type(engine.basic_optimizer).__name__ == "AdamW", "no optimizer that has to be compiled"
    steps(job, save=tmp_path, zero_stage=stage, offload=offload)
    after, _ = steps(job, start=2, saved=tmp_path, zero_stage=stage)
    assert after == pytest.approx(expected[2:], rel=1e-6), "a checkpoint can be continued without offloading"


def test_buckets_grow_with_the_workers_up_to_a_limit_and_are_not_larger_than_the_model():
    on_gpus = [bucket_elements(True, workers) for workers in (1, 2, 8, 16, 32, 64)]
    assert on_gpus == [50_000_000, 50_000_000, 50_000_000, 100_000_000, 200_000_000, 200_000_000]
    assert [bucket_elements(False, workers) for workers in (1, 4, 8, 64)] == [10**7, 10**7, 2 * 10**7, 5 * 10**7]
    assert bucket_elements(True, 64, weights=3_000_000) == 3_000_000
    assert bucket_elements(True, 64, weights=7 * 10**9) == 200_000_000
    sixteen = CONFIG.model_copy(update={"num_workers": 16})
    for settings, elements in [
        (zero_settings(sixteen), 40_000_000),
        (zero_settings(sixteen, workers=8), 20_000_000),  # some nodes were lost
        (sixteen.deepspeed(8, 1000)["zero_optimization"], 1000),
    ]:
        assert settings["reduce_bucket_size"] == settings["allgather_bucket_size"] == elements


def test_gpus_get_pinned_memory_and_weights_stay_where_they_are_unless_asked_for():
    plain = zero_settings(TrainConfig(num_workers=2, gpus_per_worker=1))
    assert not {"offload_optimizer", "offload_param"} & set(plain)
    asked = zero_settings(TrainConfig(num_workers=2, gpus_per_worker=1, offload="optimizer"))
    assert asked == plain | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}


@pytest.mark.parametrize(
    ("keys", "workers", "overlapping"),
    [
        ({"gpus_per_worker": 1, "zero_stage": 1}, 8, True),
        ({"gpus_per_worker": 1, "zero_stage": 2}, 8, True),
        ({"gpus_per_worker": 1, "zero_stage": 2}, 1, None),
        ({"gpus_per_worker": 0, "zero_stage": 2}, 8, None),
        ({"gpus_per_worker": 1, "zero_stage": 3}, 8, None),  # DeepSpeed's default is to do it
        ({"gpus_per_worker": 1, "zero_stage": 0, "precision": "fp32"}, 8, None),
    ],
)
def test_gpus_exchange_gradients_beside_the_backward_pass(keys, workers, overlapping):
    assert zero_settings(TrainConfig(num_workers=8, **keys), workers).get("overlap_comm") is overlapping


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"zero_stage": 0, "precision": "fp32"}, "zero_stage: 1 or more"),
        ({"zero_stage": 2, "offload": "optimizer_and_weights"}, "zero_stage: 3, or offload: optimizer"),
        ({"optimizer": "muon"}, "set optimizer: adamw"),
        ({"optimizer": "adamw_8bit"}, "set optimizer: adamw"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        TrainConfig.model_validate({"offload": "optimizer", **changes})


def test_where_the_state_lies_changes_no_result():
    offloaded = TrainConfig(offload="optimizer")
    assert offloaded.run_identity("digest", "student") == TrainConfig().run_identity("digest", "student")
