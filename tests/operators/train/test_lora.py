"""Adapters: what is trained and exported; noise, sharding and restarts work as with other weights."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from operators.student.packed_loss import load_trainable, summed_loss
from operators.train.checkpoint import newest_good
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.export import export_student
from operators.train.job import TrainJob
from operators.train.lora import LoraConfig, adapted_layers, with_adapters
from operators.train.pack_order import PackStore, read_index
from operators.train.saving import save_checkpoint
from operators.train.trainer import Trainer

LORA = LoraConfig(r=4, dropout=0.1)


def test_keys_that_would_have_no_effect_are_refused():
    with pytest.raises(ValidationError, match=r"set lora\.r"):
        LoraConfig(alpha=8)
    with pytest.raises(ValidationError, match="lora: target_modules, merge have no effect with r: 0"):
        LoraConfig(target_modules=["q_proj"], merge=False)
    assert LoraConfig(r=8).scaled_by == 16
    assert LoraConfig(r=8, alpha=4).scaled_by == 4


def test_only_adapters_of_linear_layers_are_trained_and_start_at_nothing(tiny_model, packs_file):
    pack = PackStore([packs_file]).pack(0)
    plain = load_trainable(tiny_model, torch.float32)
    expected = summed_loss(plain, pack).item()
    model = with_adapters(plain, LoraConfig(r=4), seed=3)
    assert summed_loss(model, pack).item() == expected
    assert sorted({name.split(".")[-1] for name in adapted_layers(model)}) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert {name.split(".")[-3] for name, each in model.named_parameters() if each.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    again = with_adapters(load_trainable(tiny_model, torch.float32), LoraConfig(r=4), seed=3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["lm_head"], "gives the output head an adapter"),
        (["embed_tokens", "q_proj"], "gives the embedding an adapter"),
        (["no_such_layer"], "no_such_layer"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_named(tiny_model, modules, text):
    with pytest.raises(ValueError, match=r"train\.lora\.target_modules") as raised:
        with_adapters(load_trainable(tiny_model, torch.float32), LoraConfig(r=4, target_modules=modules), seed=0)
    assert text in str(raised.value)


@pytest.fixture(scope="module")
def job(process_group, tiny_model, packs_file, tmp_path_factory):
    """A job of one worker with adapters, inside a process group of this process."""
    config = TrainConfig(
        max_steps=4, packs_per_step=3, learning_rate=1e-2, precision="fp32", lora=LORA, activation_checkpointing=True
    )
    prepare_process(config)
    digest = read_index([packs_file]).digest
    return TrainJob(config, tiny_model, str(tmp_path_factory.mktemp("lora")), [packs_file], digest, "identity")


def steps(job, count, start=0, save=None, saved=None):
    """The measurements of some steps, which may start from a checkpoint and may end with one."""
    checkpoint = newest_good(saved, job.spec)[0] if saved else None
    with loaded(job, checkpoint) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        measured = [trainer.step(step) for step in range(start, start + count)]
        if save:
            save_checkpoint(engine, save, start + count, job.spec)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_every_stage_learns_the_same_noised_and_goes_on_from_its_checkpoint(job, tmp_path, stage, precision):
    one = replace(job, config=job.config.model_copy(update={"zero_stage": stage, "precision": precision}))
    whole = steps(one, 4)
    expected = steps(replace(job, config=job.config.model_copy(update={"zero_stage": 1})), 4)
    assert [step.loss for step in whole] == pytest.approx(
        [step.loss for step in expected], rel=1e-5 if precision == "fp32" else 2e-3
    )
    assert whole[-1].loss < whole[0].loss
    assert whole[0].neft_l2 == pytest.approx(5 / 3**0.5, rel=0.05)
    quiet = one.config.model_copy(update={"neftune_alpha": 0})
    assert steps(replace(one, config=quiet), 1)[0].loss != whole[0].loss
    steps(one, 2, save=tmp_path)
    assert [step.loss for step in steps(one, 2, start=2, saved=tmp_path)] == [step.loss for step in whole[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_the_export_is_the_base_with_its_adapters_merged_or_the_adapters_alone(job, tmp_path, stage):
    one = replace(job, config=job.config.model_copy(update={"zero_stage": stage}))
    store = PackStore(job.files)
    tokens = torch.tensor([store.pack(0).input_ids])
    with loaded(one) as (engine, noise):
        trainer = Trainer(one, engine, noise, store)
        for step in range(2):
            trainer.step(step)
        export_student(engine, one.student, tmp_path / "merged", LORA)
        export_student(engine, one.student, tmp_path / "alone", LORA.model_copy(update={"merge": False}))
        engine.eval()
        with torch.no_grad():
            expected = engine(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(one.student)
        assert not torch.allclose(base(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-4)
        together = PeftModel.from_pretrained(base, tmp_path / "merged" / "adapter")
        students = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "alone")]
        for model in [*students, together.eval()]:
            torch.testing.assert_close(model.eval()(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(f"{one.student}/model.safetensors").keys()
    assert not (tmp_path / "alone" / "model.safetensors").exists()
