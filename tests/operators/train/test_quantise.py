"""Adapters over weights of four bits, with the real bitsandbytes where it is installed."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from operators.student.packed_loss import load_trainable
from operators.train import quantise
from operators.train.checkpoint import newest_good
from operators.train.config import TrainConfig
from operators.train.engine import load_student, loaded
from operators.train.export import export_student
from operators.train.lora import LoraConfig, adapted_layers
from operators.train.pack_order import PackStore
from operators.train.saving import save_checkpoint
from operators.train.throughput import model_cost
from operators.train.trainer import Trainer

LORA = LoraConfig(r=4)
CONFIG = TrainConfig(
    max_steps=4, packs_per_step=3, precision="fp32", learning_rate=1e-2, lora=LORA, quantize="4bit", zero_stage=2
)
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(quantise.PACKAGE) is None, reason=f"needs {quantise.PACKAGE}"
)


def steps(job, start=0, end=4, save=None, saved=None, **changes):
    """The measurements of some steps, which may begin at a checkpoint and end with one."""
    one = replace(job, config=CONFIG.model_copy(update=changes))
    checkpoint = newest_good(saved, one.spec)[0] if saved else None
    with loaded(one, checkpoint) as (engine, noise):
        trainer = Trainer(one, engine, noise, PackStore(one.files))
        measured = [trainer.step(step) for step in range(start, end)]
        if save:
            save_checkpoint(engine, save, end, one.spec)
    return measured


@pytest.mark.slow
@needs_package
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_learn_over_quantised_weights_and_go_on_from_a_checkpoint(job, tmp_path, precision):
    whole = steps(job, precision=precision)
    plain = steps(job, precision=precision, quantize="none", end=1)
    assert whole[-1].loss < whole[0].loss
    assert whole[0].neft_l2 == pytest.approx(5 / 3**0.5, rel=0.05)
    assert whole[0].loss != plain[0].loss, "nothing was quantised"
    assert whole[0].loss == pytest.approx(plain[0].loss, rel=0.02), "the error of quantisation is small"
    assert whole[0].model_flops == plain[0].model_flops, "packed weights count as what they stand for"
    steps(job, precision=precision, end=2, save=tmp_path)
    after = steps(job, precision=precision, start=2, saved=tmp_path)
    assert [step.loss for step in after] == [step.loss for step in whole[2:]]


@needs_package
def test_the_export_is_the_original_with_merged_adapters(job, tmp_path):
    one = replace(job, config=CONFIG)
    with loaded(one) as (engine, noise):
        trainer = Trainer(one, engine, noise, PackStore(one.files))
        for step in range(2):
            trainer.step(step)
        export_student(engine, one.student, tmp_path / "merged", LORA)
        export_student(engine, one.student, tmp_path / "alone", LORA.model_copy(update={"merge": False}))
        changes = {
            name: layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
            for name, layer in adapted_layers(engine.module).items()
        }
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (one.student, tmp_path / "merged"))
    assert after.keys() == before.keys()
    for name, weight in before.items():
        change = changes.get(name.removesuffix(".weight"), torch.zeros_like(weight))
        torch.testing.assert_close(after[name], weight + change)
    assert any(change.abs().max() > 1e-3 for change in changes.values())
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("merged", "alone")]
    tokens = torch.tensor([PackStore(job.files).pack(0).input_ids])
    with torch.no_grad():
        merged, alone = (model(input_ids=tokens).logits for model in both)
    torch.testing.assert_close(merged, alone, rtol=1e-4, atol=1e-5)


@needs_package
def test_weights_take_four_bits_and_count_as_many(tiny_model):
    model, whole = load_student(tiny_model, CONFIG), load_trainable(tiny_model, torch.float32)
    packed = {name: each for name, each in model.named_parameters() if quantise.is_quantised(each)}
    assert len(packed) == 14
    assert not any("embed" in name or "lm_head" in name for name in packed)
    for name, each in packed.items():
        assert quantise.num_weights(each) == whole.get_parameter(name).numel() == 2 * each.numel()
    assert model_cost(model).per_square == model_cost(whole).per_square


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora": {}}, "set lora.r"),
        ({"zero_stage": 3}, "zero_stage: 2 or less"),
        ({"compile": True}, "compile: false"),
    ],
)
def test_what_cannot_be_quantised_is_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        TrainConfig.model_validate({"quantize": "4bit", "lora": {"r": 4}, **changes})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert quantise.missing_package(TrainConfig()) == ""
    with pytest.raises(ValueError, match=r"train.quantize: 4bit needs bitsandbytes.*pip install bitsandbytes"):
        quantise.loading_options(CONFIG, torch.float32)


def test_quantised_weights_make_another_student_and_the_default_none():
    base = TrainConfig(lora=LORA)
    assert "quantize" not in base.identity()
    assert CONFIG.run_identity("digest", "student") != CONFIG.model_copy(update={"quantize": "none"}).run_identity(
        "digest", "student"
    )
