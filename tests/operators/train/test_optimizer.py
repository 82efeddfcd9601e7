"""Each optimizer in the real loop of one worker; Muon on two workers is in test_train.py."""

import importlib.util
from dataclasses import replace

import pytest
from pydantic import ValidationError

from operators.train import optimizer
from operators.train.config import TrainConfig
from operators.train.engine import loaded
from operators.train.pack_order import PackStore
from operators.train.trainer import Trainer

CONFIG = TrainConfig(max_steps=6, packs_per_step=3, precision="fp32", schedule="constant", warmup_fraction=0)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def losses_of(job, **changes):
    job = replace(job, config=CONFIG.model_copy(update=changes))
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        return [trainer.step(step).loss for step in range(6)], engine


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adafactor", "zero_stage": 0},
        {"optimizer": "muon", "zero_stage": 2},
        pytest.param(
            {"optimizer": "adamw_8bit", "zero_stage": 2},
            marks=pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes"),
        ),
    ],
    ids=lambda changes: changes["optimizer"],
)
def test_the_loss_falls_at_a_rate_like_adamws(job, changes):
    expected, _ = losses_of(job, learning_rate=1e-3)
    found, engine = losses_of(job, learning_rate=1e-3, **changes)
    assert type(engine.basic_optimizer).__name__.lower() != "adamw"
    assert found[0] == pytest.approx(expected[0], rel=1e-6), "before the first update nothing differs"
    assert found[-1] < found[0]
    assert expected[0] - found[-1] > 0.3 * (expected[0] - expected[-1])


def test_muon_has_a_rate_of_its_own_and_is_not_clipped():
    assert TrainConfig(optimizer="muon").deepspeed()["gradient_clipping"] == 0, "ZeRO would clip the update"
    groups = [{"use_muon": True}, {"use_muon": False}, {}]
    optimizer.set_rate(groups, 0.25, TrainConfig(optimizer="muon", muon_rate_factor=4))
    assert [group["lr"] for group in groups] == [1.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer": "adafactor"}, "zero_stage: 0 and precision: fp32"),
        ({"optimizer": "adafactor", "zero_stage": 0}, "precision: bf16"),
        ({"optimizer": "muon", "zero_stage": 3}, "zero_stage: 2 or less"),
        ({"optimizer": "muon", "lora": {"r": 4}}, "optimizer: adamw"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        TrainConfig.model_validate(changes)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        optimizer.own_optimizer([], TrainConfig(optimizer="adamw_8bit"))


def test_an_optimizer_makes_another_student_and_the_default_none():
    base = TrainConfig().run_identity("digest", "student")
    assert TrainConfig(optimizer="muon").run_identity("digest", "student") != base
    assert "optimizer" not in TrainConfig().identity()
    assert TrainConfig(optimizer="muon").identity()["optimizer"] == "muon"
