"""Families that multiply their embeddings, before or after the noise; all tiny, random, and run by their own code."""

import pytest
import torch
import transformers as tf

from kernels.neftune import batch_of_pack, neftune
from operators.student.embedding_gain import EmbeddingGain, embedding_gain

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES = {  # configuration, factor after the embedding module, factor inside it
    "llama": (lambda: tf.LlamaConfig(**SIZES), 1, 1),
    "granite": (lambda: tf.GraniteConfig(**SIZES, embedding_multiplier=12.0), 12, 1),
    "falcon_h1": (lambda: tf.FalconH1Config(**SIZES, **MAMBA, embedding_multiplier=5.65), 5.65, 1),
    "recurrent_gemma": (lambda: tf.RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, lru_width=64), 8, 1),
    "gemma": (lambda: tf.GemmaConfig(**SIZES, head_dim=16), 1, 8),
    "gemma3": (lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16), 1, 8),
    "opt, which adds positions": (lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=64), 1, 1),
}


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_of_a_family_are_measured_on_its_own_code(family, dtype):
    config, factor, inside = FAMILIES[family]
    model = model_of(config(), dtype)
    found = embedding_gain(model)
    assert (found.factor, found.uniform) == (factor, True)
    assert found.inside == pytest.approx(inside, rel=0.01)
    assert model.training
    assert not [hooks for one in model.modules() if (hooks := one._forward_hooks or one._forward_pre_hooks)]
    assert bool(found.note) == (factor * inside != 1)
    assert found.problem == ""


@pytest.mark.parametrize(("family", "wrong"), [("llama", 1), ("gemma", 1), ("granite", 12)])
def test_the_noise_has_the_norm_of_the_paper_at_the_first_layer(family, wrong):
    model = model_of(FAMILIES[family][0]())
    embedding, ids = model.get_input_embeddings(), torch.arange(300)[None]
    batch, expected = batch_of_pack([200, 100], [1, 2], 300, epoch=0), 5 / 3**0.5

    def norms(gain):
        """Of each document: the change of what the first layer reads, and what the hook says about it."""
        with torch.no_grad():
            clean = at_first_layer(model, ids)
        with neftune(embedding, 5.0, seed=0, gain=gain) as noise:
            noise.set_batch(batch)
            noisy = at_first_layer(model, ids)
            return [part.norm().item() for part in (noisy - clean)[0].split([200, 100])], noise.l2_per_document()

    assert norms(1.0)[0] == pytest.approx([wrong * expected] * 2, rel=0.03)  # Granite: 34.6
    measured, said = norms(embedding_gain(model).factor)
    assert measured == pytest.approx([expected] * 2, rel=0.03)
    torch.testing.assert_close(said, torch.tensor(measured), rtol=1e-4, atol=0)


def at_first_layer(model, ids):
    read = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return read[0].detach()


@pytest.mark.parametrize(
    "config",
    [
        lambda: tf.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4),
        lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=32),
    ],
    ids=["norm of the embeddings", "embeddings of another size"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_does_more_than_multiply_is_a_problem_with_a_cure(config, dtype):
    found = embedding_gain(model_of(config(), dtype))
    assert not found.uniform
    assert "set train.neftune_alpha: 0" in found.problem


def test_a_note_says_what_was_divided_and_how_much_weaker_the_noise_is_beside_the_embeddings():
    assert EmbeddingGain().note == EmbeddingGain(inside=1.002).note == ""
    assert "multiplies its embeddings by 12; the noise is divided by this factor" in EmbeddingGain(12.0).note
    assert "by 48; the noise has the norm alpha / sqrt(3)" in EmbeddingGain(inside=48.0).note


def test_a_model_that_calls_no_layer_is_named():
    model = model_of(tf.LlamaConfig(**SIZES))
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="LlamaForCausalLM calls no list of layers"):
        embedding_gain(model)
