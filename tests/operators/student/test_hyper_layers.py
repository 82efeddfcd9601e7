"""Which layers of a student can use HyperAttention: those that may read every earlier token, with heads that fit."""

from pathlib import Path

import pytest
from transformers import (
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
)

from operators.student.doctor import StudentNeeds, examine_student
from operators.student.hyper_layers import hyper_attention_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("layers", "meant"), [("all", [0, 1, 2, 3, 4, 5]), ("last:2", [4, 5]), ("first:1", [0]), ("odd", [1, 3, 5])]
)
def test_all_chosen_layers_of_a_student_without_windows_can_use_it(layers: str, meant: list[int]) -> None:
    assert hyper_attention_layers(LlamaConfig(**SIZES), layers) == (meant, meant)


def test_chosen_layers_with_a_window_stay_exact() -> None:
    assert hyper_attention_layers(MistralConfig(**SIZES, sliding_window=16), "all") == ([0, 1, 2, 3, 4, 5], [])
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    gemma = Gemma3TextConfig(**SIZES, head_dim=16, layer_types=kinds)
    assert hyper_attention_layers(gemma, "all") == ([0, 1, 2, 3, 4, 5], [5])


LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "n_routed_experts": 4, "first_k_dense_replace": 6}


def test_layers_whose_heads_do_not_fit_stay_exact() -> None:
    everything = [0, 1, 2, 3, 4, 5]
    latent = DeepseekV2Config(**SIZES | LATENT, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    assert hyper_attention_layers(latent, "all") == (everything, [])
    alike = DeepseekV2Config(**SIZES | LATENT, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24)
    assert hyper_attention_layers(alike, "all") == (everything, everything)
    for size, used in ((8, []), (256, everything), (512, [])):
        assert hyper_attention_layers(LlamaConfig(**SIZES, head_dim=size), "all") == (everything, used)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma2Config(**SIZES, head_dim=16), "attn_logit_softcapping"),
        (GptOssConfig(**SIZES, head_dim=16, num_local_experts=4), "sinks"),
        (LlamaConfig(**SIZES, attention_dropout=0.1), r"a dropout of 0\.1"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64), r"a dropout of 0\.1"),
        (OPTConfig(**SIZES, attention_dropout=0.2), r"a dropout of 0\.2"),
    ],
    ids=["gemma2", "gpt_oss", "llama", "gpt2", "opt"],
)
def test_a_student_whose_training_would_raise_is_refused(config: PretrainedConfig, words: str) -> None:
    with pytest.raises(ValueError, match=f"student has {words}, which .* use train.attention: sdpa"):
        hyper_attention_layers(config, "last:1")


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=30.0),
        DeepseekV2Config(**SIZES | LATENT, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    ],
    ids=["gemma2", "deepseek_v2"],
)
def test_the_doctor_finds_it_before_the_run(config: PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    found = examine_student(str(tmp_path), StudentNeeds(max_tokens=64, hyper_attention_layers="all"))
    assert [finding.fatal for finding in found if finding.key == "train.hyper_attention_layers"] == [True]


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="9"):
        hyper_attention_layers(LlamaConfig(**SIZES), [9])
