"""Optimizer steps of one worker in this process, with a real DeepSpeed engine."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

from operators.student.packed_attention import attention_in_use, set_documents, use_packed_attention
from operators.train import trainer as trainer_module
from operators.train.config import TrainConfig
from operators.train.engine import load_student, loaded
from operators.train.export import gathered_weights
from operators.train.pack_order import PackStore
from operators.train.trainer import NotFiniteError, Trainer, packs_at_once, window_note

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
    assert packs_at_once(model, SEVERAL, 50) == (3, "")
    model.adapter_dropout = nn.Dropout(0.1)
    assert packs_at_once(model, SEVERAL, 50)[0] == 1
    assert "dropout" in packs_at_once(model, SEVERAL, 50)[1]
    model.adapter_dropout = nn.Dropout(0.0)
    model.config.attention_dropout = 0.1
    assert packs_at_once(model, SEVERAL, 50)[0] == 1


def test_packs_are_read_one_at_a_time_if_attention_masks_a_whole_pass(tiny_model):
    model = load_student(tiny_model, SEVERAL)
    model.set_attn_implementation("sdpa")
    assert attention_in_use(model) == "sdpa"
    number, note = packs_at_once(model, SEVERAL, 50)
    assert number == 1
    assert "attention sdpa" in note
    assert packs_at_once(model, SEVERAL.model_copy(update={"packs_per_pass": 1}), 50) == (1, "")


def test_a_window_shorter_than_a_document_masks_a_whole_pass_and_the_report_says_so():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads, sliding_window=8))
    use_packed_attention(model)
    masks = []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, args, options, out: masks.append(options["attention_mask"]), with_kwargs=True
    )
    for longest in (8, 9):
        set_documents([5, longest, 1])
        tokens = torch.arange(6 + longest)[None]
        model(
            input_ids=tokens, position_ids=torch.cat([torch.arange(n) for n in (5, longest, 1)])[None], use_cache=False
        )
    set_documents([])
    assert masks[0] is None
    assert masks[1].shape[-2:] == (15, 15)
    assert packs_at_once(model, SEVERAL, 8) == (3, "")
    assert window_note(model, 8) == ""
    assert attention_in_use(model, 8) == "sdpa per document"
    number, note = packs_at_once(model, SEVERAL, 9)
    assert number == 1
    assert "layers with a window mask a whole pass" in note
    assert "window of 8 tokens" in window_note(model, 9)
    assert "longest document has 9 tokens; with pack.max_tokens up to 8" in window_note(model, 9)
    assert attention_in_use(model, 9) == "sdpa per document, with a mask in layers with a window"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_gradient_that_is_not_finite_updates_nothing_although_the_loss_is(job, monkeypatch, stage, precision):
    one = replace(job, config=job.config.model_copy(update={"zero_stage": stage, "precision": precision}))
    whole, factors = trainer_module.summed_loss, iter([1.0, 1.0, 1.0, float("nan")])

    def with_gradient_times(*args):
        factor, loss = next(factors, 1.0), whole(*args)
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    monkeypatch.setattr(trainer_module, "summed_loss", with_gradient_times)
    with loaded(one) as (engine, noise):
        trainer = Trainer(one, engine, noise, PackStore(one.files))
        assert trainer.step(0).grad_norm > 0
        before = gathered_weights(engine.module)
        with pytest.raises(
            NotFiniteError, match=r"gradient at step 1 is (nan|inf) with a loss of 1\d\.\d+, and nothing"
        ):
            trainer.step(1)
        for name, weight in gathered_weights(engine.module).items():
            assert torch.equal(weight, before[name]), name
