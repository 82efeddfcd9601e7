"""The loss computed in chunks of tokens equals the loss of all logits at once, with the same gradients."""

import pytest
import torch
import transformers as tf

from operators.student import chunked_loss
from operators.student.chunked_loss import compile_loss, return_loss, rows_at_a_time

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "logits divided": lambda: tf.GraniteConfig(**SIZES, logits_scaling=8.0),
    "logits multiplied": lambda: tf.CohereConfig(**SIZES, logit_scale=0.25),
    "head with bias": lambda: tf.PhiConfig(**SIZES),
    "soft cap": lambda: tf.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.3),
    "soft cap of a text model": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16, final_logit_softcapping=0.3),
    "soft cap that None does not end": lambda: tf.RecurrentGemmaConfig(
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}, logits_soft_cap=0.3
    ),
    "soft cap of NanoChat": lambda: tf.NanoChatConfig(**SIZES, final_logit_softcapping=0.3),
}


def loss_and_gradients(model, tokens, kept, targets):
    model.zero_grad()
    loss = model(input_ids=tokens, use_cache=False, logits_to_keep=kept, targets=targets)
    loss.backward()
    return loss.item(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family, recomputed, monkeypatch):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]()).train()
    settings = model.config.to_dict()
    tokens = torch.randint(1000, (1, 90))
    kept = torch.arange(7, 80)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 8:81], reduction="sum").item()
    return_loss(model)
    whole = loss_and_gradients(model, tokens, kept, tokens[0, 8:81])
    seen = []
    if recomputed:
        model.get_output_embeddings().weight.ds_id = 0  # as under ZeRO-3
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: seen.append(out.shape))
    else:
        compile_loss(model, lambda of_part: lambda *part, **cap: seen.append(part[0].shape) or of_part(*part, **cap))
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 10 * 1000 * 16)
    parts = loss_and_gradients(model, tokens, kept, tokens[0, 8:81])
    assert whole[0] == pytest.approx(expected, rel=1e-6)
    assert parts[0] == pytest.approx(expected, rel=1e-6)
    assert parts[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert max(shape[0] for shape in seen[recomputed:]) <= 10, "no more logits than were allowed"
    assert model.config.to_dict() == settings
    if "soft cap" in family:
        assert logits.abs().max() > 0.2, "the cap changes something"


def test_a_gib_holds_the_logits_of_a_large_vocabulary():
    rows = rows_at_a_time(152_000)
    assert 256 < rows < 1024
    assert rows * 152_000 * 16 <= 1 << 30


def test_a_frozen_head_gets_no_gradient_and_what_it_reads_gets_its_own(monkeypatch):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    return_loss(model)
    tokens, kept = torch.randint(1000, (1, 30)), torch.arange(3, 29)
    whole = loss_and_gradients(model, tokens, kept, tokens[0, 4:30])
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 10 * 1000 * 16)
    parts = loss_and_gradients(model, tokens, kept, tokens[0, 4:30])
    assert "lm_head.weight" not in parts[1]
    assert parts[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        loss = model(input_ids=tokens, use_cache=False, logits_to_keep=kept, targets=tokens[0, 4:30])
    assert loss.item() == pytest.approx(whole[0], rel=1e-6)


def test_in_half_precision_the_gradient_is_scaled_without_another_rounding(monkeypatch):
    monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", 10 * 1000 * 16)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.bfloat16).train()
    return_loss(model)
    tokens, kept = torch.randint(1000, (1, 30)), torch.arange(3, 29)
    gradients = []
    for scale in (1.0, 1 / 3):  # in bfloat16 this is 0.334
        model.zero_grad()
        loss = model(input_ids=tokens, use_cache=False, logits_to_keep=kept, targets=tokens[0, 4:30])
        (loss * scale).backward()
        gradients.append(model.get_output_embeddings().weight.grad.double().norm())
    assert (gradients[1] / gradients[0]).item() == pytest.approx(1 / 3, rel=5e-4)


def test_without_targets_the_model_is_as_before():
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    tokens = torch.randint(1000, (1, 20))
    before = model(input_ids=tokens).logits
    return_loss(model)
    assert torch.equal(model(input_ids=tokens).logits, before)
