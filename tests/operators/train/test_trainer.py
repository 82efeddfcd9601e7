"""Optimizer steps of one worker in this process, with a real DeepSpeed engine."""

from dataclasses import replace

import pytest
from torch import nn

from operators.student.packed_attention import attention_in_use
from operators.train.config import TrainConfig
from operators.train.engine import load_student, loaded
from operators.train.pack_order import PackStore
from operators.train.trainer import Trainer, packs_at_once

SEVERAL = TrainConfig(packs_per_pass=3, precision="fp32")


def curve(job, **changes):
    """Losses and noise of three steps, and the number of forward passes."""
    job = replace(job, config=job.config.model_copy(update=changes))
    passes = []
    with loaded(job) as (engine, noise):
        engine.module.register_forward_hook(lambda *_: passes.append(1))
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        steps = [trainer.step(step) for step in range(3)]
    assert trainer.notes == []
    return [step.loss for step in steps], [step.neft_l2 for step in steps], len(passes)


def test_several_packs_per_pass_give_the_same_curve(job):
    losses, noise, passes = curve(job, zero_stage=2)
    together, same_noise, fewer = curve(job, zero_stage=2, packs_per_pass=2)
    assert passes == 9
    assert fewer == 6, "three packs per step are two passes"
    assert together == pytest.approx(losses, rel=1e-6)
    assert same_noise == pytest.approx(noise, rel=1e-6)


def test_with_dropout_packs_are_read_one_at_a_time(tiny_model):
    model = load_student(tiny_model, SEVERAL)
    assert packs_at_once(model, SEVERAL) == (3, "")
    model.adapter_dropout = nn.Dropout(0.1)
    assert packs_at_once(model, SEVERAL)[0] == 1
    assert "dropout" in packs_at_once(model, SEVERAL)[1]
    model.adapter_dropout = nn.Dropout(0.0)
    model.config.attention_dropout = 0.1
    assert packs_at_once(model, SEVERAL)[0] == 1


def test_packs_are_read_one_at_a_time_if_attention_masks_a_whole_pass(tiny_model):
    model = load_student(tiny_model, SEVERAL)
    model.set_attn_implementation("sdpa")
    assert attention_in_use(model) == "sdpa"
    number, note = packs_at_once(model, SEVERAL)
    assert number == 1
    assert "attention sdpa" in note
    assert packs_at_once(model, SEVERAL.model_copy(update={"packs_per_pass": 1})) == (1, "")
