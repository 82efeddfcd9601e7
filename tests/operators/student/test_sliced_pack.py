"""The heads and windows with which several workers can share a pack."""

import pytest
import transformers as tf

from operators.student.sliced_pack import smallest_window, unfit_heads, unfit_window

SMOLLM = tf.LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("heads", "key_heads", "fitting"),
    [
        (9, 3, {1, 3, 9}),
        (32, 8, {1, 2, 4, 8, 16, 32}),
        (4, 1, {1, 2, 4}),
        (12, 12, {1, 2, 3, 4, 6, 12}),
        (14, 2, {1, 2, 14}),
    ],
)
def test_the_workers_divide_the_heads_or_repeat_the_keys(heads, key_heads, fitting):
    config = tf.LlamaConfig(hidden_size=heads * 16, num_attention_heads=heads, num_key_value_heads=key_heads)
    assert {size for size in range(1, 33) if not unfit_heads(config, size)} == fitting


def test_a_refusal_names_value_limit_and_cure():
    assert unfit_heads(SMOLLM, 2) == (
        "2 workers cannot divide the 9 heads of the student's attention and its 3 heads of keys; set it to one of "
        "1, 3, 9"
    )
    assert "no heads of attention" in unfit_heads(tf.MambaConfig(), 2)


def test_a_window_must_cover_the_documents_and_leave_hyper_attention_alone():
    mistral = tf.MistralConfig(sliding_window=512)
    assert smallest_window(mistral) == 512
    assert unfit_window(mistral, 512, hyper_attention=False) == ""
    assert "lower pack.max_tokens to 512" in unfit_window(mistral, 513, hyper_attention=False)
    assert "use train.attention: sdpa" in unfit_window(mistral, 512, hyper_attention=True)
    gemma = tf.Gemma3TextConfig(num_hidden_layers=2, layer_types=KINDS, sliding_window=64)
    assert smallest_window(gemma) == 64
    everywhere = tf.Gemma3TextConfig(num_hidden_layers=2, layer_types=KINDS[1:] * 2, sliding_window=64)
    for config in (SMOLLM, tf.Qwen2Config(), tf.MistralConfig(sliding_window=None), everywhere):
        assert smallest_window(config) is None
        assert unfit_window(config, 1 << 20, hyper_attention=True) == ""
