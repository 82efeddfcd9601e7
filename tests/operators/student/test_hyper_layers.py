"""Which layers of a student can use HyperAttention: those that may read every earlier token."""

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

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


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="9"):
        hyper_attention_layers(LlamaConfig(**SIZES), [9])
