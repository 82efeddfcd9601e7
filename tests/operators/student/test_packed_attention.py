"""The attention of a pack equals that of its separate documents, in every layout of heads, and needs no mask."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from operators.student import packed_attention as module
from operators.student.packed_attention import _mask, packed_attention, set_documents

LENGTHS = [5, 9, 1]


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.fixture
def pack():
    set_documents(LENGTHS)
    yield [torch.randn(1, heads, sum(LENGTHS), 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    set_documents([])


def alone(query, key, value):
    parts = zip(*(torch.split(tensor, LENGTHS, 2) for tensor in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": 0.2, "enable_gqa": True}
    return torch.cat([scaled_dot_product_attention(*part, **options) for part in parts], 2).transpose(1, 2)


def test_output_and_gradients_are_those_of_the_documents_alone(pack):
    out, weights = packed_attention(Layer(), *pack, None, scaling=0.2)
    expected = alone(*pack)
    assert weights is None
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, pack, grad), torch.autograd.grad(expected, pack, grad))


def test_documents_of_another_forward_pass_are_not_taken_for_this_one(pack):
    shorter = [tensor[:, :, :7] for tensor in pack]
    out, _ = packed_attention(Layer(), *shorter, None, scaling=0.2)
    whole = scaled_dot_product_attention(*shorter, is_causal=True, scale=0.2, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, whole)


@pytest.mark.parametrize(("window", "needed"), [(None, False), (9, False), (8, True)])
def test_a_mask_is_made_only_where_a_window_hides_something_within_a_document(pack, window, needed):
    def causal(batch, head, query, key):
        return key <= query

    mask = _mask(1, 15, 15, causal, None, local_size=window, q_offset=0, kv_offset=0, allow_is_causal_skip=False)
    assert (mask is not None) == needed


def test_a_cpu_has_no_kernel_for_many_documents():
    module._has_varlen.cache_clear()
    assert not module._has_varlen("cpu", torch.bfloat16)
    assert not module._has_varlen("cuda", torch.float32)


def test_a_replaced_attention_is_back_after_the_context():
    def other(*_, **__):
        return None

    with module.replaced_attention(module.NAME, other, other):
        assert AttentionInterface()[module.NAME] is AttentionMaskInterface()[module.NAME] is other
    assert AttentionInterface()[module.NAME] is packed_attention
    assert AttentionMaskInterface()[module.NAME] is _mask


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [((64, 64), True), ((256, 256), True), ((512, 512), False), ((24, 16), False), ((20, 20), False)],
)
def test_heads_that_the_kernel_for_many_documents_cannot_take_are_read_by_document(monkeypatch, sizes, kernel):
    calls = []
    monkeypatch.setattr(module, "_has_varlen", lambda *_: True)
    monkeypatch.setattr(module, "_varlen_attention", lambda *_: calls.append(1))
    query, key = (torch.randn(1, heads, sum(LENGTHS), sizes[0]) for heads in (4, 2))
    value = torch.randn(1, 2, sum(LENGTHS), sizes[1])
    set_documents(LENGTHS)
    try:
        out, _ = packed_attention(Layer(), query, key, value, None, scaling=0.2)
    finally:
        set_documents([])
    assert bool(calls) == kernel
    if not kernel:
        torch.testing.assert_close(out, alone(query, key, value))
