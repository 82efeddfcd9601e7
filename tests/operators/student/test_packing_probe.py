"""Model families whose documents stay separate in a pack, and families whose documents do not; all tiny and random."""

import pytest
import torch
import transformers as tf

from operators.student.chunked_loss import return_loss
from operators.student.packed_attention import attention_in_use, use_packed_attention
from operators.student.packing_probe import PackingProbe, compare, first_layers

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
APART = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16),
    "mistral with a window of 16": lambda: tf.MistralConfig(**SIZES, sliding_window=16),
    "gemma": lambda: tf.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=16, sliding_window=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "phi": lambda: tf.PhiConfig(**SIZES),
    "gpt2": lambda: tf.GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "stablelm": lambda: tf.StableLmConfig(**SIZES),
    "smollm3": lambda: tf.SmolLM3Config(**SIZES),
    "olmo2": lambda: tf.Olmo2Config(**SIZES),
    "granite": lambda: tf.GraniteConfig(**SIZES),
    "cohere": lambda: tf.CohereConfig(**SIZES),
    "starcoder2": lambda: tf.Starcoder2Config(**SIZES, sliding_window=None),
    "opt": lambda: tf.OPTConfig(
        vocab_size=512,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=64,
        dropout=0,
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SIZES, head_dim=16, **MOE),
}
LEAKING = {
    "llama4": lambda: tf.Llama4TextConfig(  # its chunks begin at places of the pack
        **SIZES,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=16,
        intermediate_size_mlp=128,
    ),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**SIZES, **LINEAR),
    "qwen3_next": lambda: tf.Qwen3NextConfig(**SIZES, **LINEAR, **MOE),
    "lfm2": lambda: tf.Lfm2Config(**SIZES, block_ff_dim=128, layer_types=["conv", "conv", "full_attention", "conv"]),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **SIZES,
        **MAMBA,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        num_local_experts=0,
        shared_intermediate_size=128,
        position_embedding_type="rope",
    ),
    "bamba": lambda: tf.BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[2]),
    "falcon_h1": lambda: tf.FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=128),
    "olmo_hybrid": lambda: tf.OlmoHybridConfig(**SIZES),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
    "falcon with alibi": lambda: tf.FalconConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}


def built(config, scale=4):
    """A random model; weights four times as large as fresh ones let tokens influence each other as in a trained one."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    use_packed_attention(model)
    return_loss(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", APART)
def test_documents_stay_apart(family):
    model = built(APART[family]())
    assert attention_in_use(model) == "sdpa per document"
    probe = PackingProbe(*compare(model), "", torch.float32)
    assert not probe.leaks, probe


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "qwen3_5"])
def test_a_leak_is_detected_in_fresh_weights_too(family):
    probe = PackingProbe(*compare(built(LEAKING[family](), scale=1)), "", torch.float32)
    assert probe.change < 1e-4, "the losses together hide it"
    assert probe.leaks, probe


@torch.no_grad()
@pytest.mark.parametrize("family", APART)
def test_a_document_apart_does_not_move_at_all(family):
    assert compare(built(APART[family](), scale=1))[1] == 0


@torch.no_grad()
@pytest.mark.parametrize("family", LEAKING)
def test_a_leak_is_detected(family):
    probe = PackingProbe(*compare(built(LEAKING[family]())), "", torch.float32)
    assert probe.leaks, probe


def test_the_first_layers_show_each_kind_once():
    small = first_layers(tf.Qwen3NextConfig(**SIZES, **LINEAR, **MOE))
    assert small.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 4
    small = first_layers(tf.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 24}, layer_types=kinds, head_dim=16))
    assert (small.num_hidden_layers, small.layer_types) == (6, kinds[:6])
    assert first_layers(tf.LlamaConfig(**SIZES)).num_hidden_layers == 2
    assert first_layers(tf.LlamaConfig(**SIZES | {"num_hidden_layers": 1})).num_hidden_layers == 1
