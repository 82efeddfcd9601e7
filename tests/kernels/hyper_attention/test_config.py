import math

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention

LOCAL = HyperAttentionConfig(mode="causal_local")


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("mode", "sparse", "causal_local"),
        ("choice", "nearest", "means"),
        ("block_size", 0, "from 1 to 65536"),
        ("num_samples", -1, "from 0"),
        ("num_projections", 11, "to 10"),
        ("num_projections", 0, "from 1"),
        ("leaf", 0, "from 1"),
        ("window", 0, "from 1"),
        ("window", math.nan, "an integer from 1"),
        ("window", math.inf, "an integer from 1"),
        ("exact_below", -1, "from 0"),
        ("exact_below", 4096.0, "an integer"),
        ("num_sinks", True, "an integer"),
        ("num_sinks", 64, "exceed num_sinks"),
        ("exact_below", "never", "an integer"),
        ("nominations", 3, "from 1 to 2"),
        ("seed", 1 << 63, "to 9223372036854775807"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_limit(name, value, limit):
    with pytest.raises(ValueError, match=limit) as error:
        HyperAttentionConfig(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("segment", [8, 48])
def test_nominated_segments_are_powers_of_two(segment):
    with pytest.raises(ValueError, match=f"segment is {segment}; .* a power of two from 16"):
        HyperAttentionConfig(mode="causal_local", choice="nominated", segment=segment)


def heads(count, tokens=20, size=16, batch=1, dtype=torch.float32):
    return torch.zeros(batch, count, tokens, size, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "more", "message"),
    [
        (heads(2)[0], heads(2), heads(2), {}, "disagree"),
        (heads(2), heads(2), heads(2, tokens=19), {}, "disagree"),
        (heads(2), heads(2, batch=2), heads(2, batch=2), {}, "disagree"),
        (heads(2, size=32), heads(2), heads(2), {}, "disagree"),
        (heads(3), heads(2), heads(2), {}, "multiple"),
        (heads(2, tokens=0), heads(2), heads(2), {}, "0"),
        (heads(2, size=8), heads(2, size=8), heads(2, size=8), {}, "D is 8; it must be from 16 to 256"),
        (heads(2, size=257), heads(2, size=257), heads(2, size=257), {}, "D is 257"),
        (heads(2, tokens=21), heads(2), heads(2), {"causal": True}, "T is 21, above S = 20"),
        (heads(2), heads(2), heads(2), {"config": LOCAL}, "causal is False"),
        (heads(2), heads(2), heads(2), {"scale": math.inf}, "scale is inf"),
        (heads(2), heads(2, dtype=torch.float64), heads(2), {}, "one dtype"),
        (heads(2).long(), heads(2).long(), heads(2).long(), {}, "floating"),
        (heads(2, tokens=19), heads(2), heads(2), {"document_ids": torch.zeros(1, 19).long()}, "T must equal S"),
        (heads(2), heads(2), heads(2), {"document_ids": torch.zeros(1, 19).long()}, r"shape \(1, 20\)"),
        (heads(2), heads(2), heads(2), {"document_ids": torch.zeros(1, 20)}, "integers"),
        (heads(2), heads(2), heads(2), {"document_ids": torch.tensor([[0] * 5 + [1] * 10 + [0] * 5])}, "decrease"),
        (heads(2), heads(2), heads(2), {"cu_seqlens": torch.tensor([0, 21])}, "at most T = 20"),
        (heads(2), heads(2), heads(2), {"cu_seqlens": torch.tensor([1, 20])}, "from 0"),
        (heads(2), heads(2), heads(2), {"cu_seqlens": torch.tensor([0, 12, 7])}, "rise"),
        (heads(1, batch=2), heads(1, batch=2), heads(1, batch=2), {"cu_seqlens": torch.tensor([0, 20])}, "B must be 1"),
        (
            heads(2),
            heads(2),
            heads(2),
            {"cu_seqlens": torch.tensor([0, 20]), "document_ids": torch.zeros(1, 20).long()},
            "give one",
        ),
    ],
)
def test_wrong_inputs_are_refused(q, k, v, more, message):
    with pytest.raises(ValueError, match=message):
        hyper_attention(q, k, v, **more)
