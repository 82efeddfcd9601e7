"""Families of students whose tokens meet only in attention, and others; all tiny and random."""

import pytest
import torch
import transformers as tf
from torch import nn

from operators.student.chunked_loss import return_loss
from operators.student.packed_attention import use_packed_attention
from operators.student.slice_probe import has_dropout, mixes_tokens, unfit_model

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
APART = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
MIXING = {
    "lfm2": lambda: tf.Lfm2Config(**SIZES, block_ff_dim=128, layer_types=["conv", "full_attention"]),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **SIZES, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, num_local_experts=0,
        layer_types=["mamba", "attention"], shared_intermediate_size=128, position_embedding_type="rope",
    ),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
}  # fmt: skip


def built(config):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # large enough for tokens to influence each other
    use_packed_attention(model)
    return_loss(model)
    return model


@pytest.mark.parametrize("family", APART)
def test_tokens_that_meet_only_in_attention_can_be_sliced(family):
    model = built(APART[family]())
    assert not mixes_tokens(model)
    assert model.training
    assert list(unfit_model(model)) == []


@pytest.mark.parametrize("family", MIXING)
def test_a_convolution_a_state_or_an_attention_of_its_own_is_refused(family):
    [problem] = unfit_model(built(MIXING[family]()))
    assert problem.endswith("set it to 1")


def test_dropout_is_refused():
    model = built(APART["llama"]())
    assert not has_dropout(model)
    model.config.attention_dropout = 0.1
    assert [problem for problem in unfit_model(model) if problem.startswith("the student has dropout")]
    model.config.attention_dropout = 0.0
    model.adapter_dropout = nn.Dropout(0.1)
    assert has_dropout(model)


def test_sinks_of_single_heads_are_refused():
    model = built(APART["llama"]())
    plain = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, **options: plain(*args, s_aux=torch.zeros(4), **options)
    assert list(unfit_model(model)) == ["LlamaAttention gives attention s_aux, with a value for each head; set it to 1"]
