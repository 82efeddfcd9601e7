"""Partial softmax results and gradients from torch's flash attention, and merging them into the whole."""

import math

import pytest
import torch

from kernels.hyper_attention.cpu.flash import merge_, part_backward, part_forward


@pytest.mark.parametrize("gap", [0.0, 100.0, -100.0, math.inf])
def test_merging(gap):
    out, lse = torch.randn(2, 3, 5), torch.randn(2, 3)
    merged, merged_lse = (out.clone(), lse.clone()) if gap < math.inf else (torch.zeros(2, 3, 5), lse - gap)
    part = out if gap == 0 else torch.randn(2, 3, 5)
    merge_(merged, merged_lse, part, lse + (gap if gap < math.inf else 0.0))
    if gap == 0:
        torch.testing.assert_close((merged, merged_lse), (out, lse + math.log(2)))
    elif gap < 0:
        assert torch.equal(merged_lse, lse)
        torch.testing.assert_close(merged, out)
    else:
        torch.testing.assert_close((merged, merged_lse), (part, lse + (100.0 if gap < math.inf else 0.0)))


@pytest.mark.parametrize("biased", [False, True])
def test_parts_of_the_keys_give_the_whole_softmax_and_its_gradients(biased):
    q, k, v, grad_out = (torch.randn(2, 3, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 40, 40, 5))
    bias = torch.randn(2, 1, 1, 40, dtype=torch.float64) if biased else torch.zeros(2, 1, 1, 40, dtype=torch.float64)
    logits = 0.3 * q @ k.mT + bias
    expected = logits.softmax(-1) @ v
    wanted = torch.autograd.grad(expected, (q, k, v), grad_out)
    parts = [(k[:, :, part], v[:, :, part], bias[..., part]) for part in (slice(0, 13), slice(13, 40))]
    with torch.no_grad():
        (out, lse), other = (part_forward(q, *part[:2], 0.3, causal=False, bias=part[2]) for part in parts)
        merge_(out, lse, *other)
        torch.testing.assert_close((out, lse), (expected, logits.logsumexp(-1)))
        found = [
            part_backward(grad_out, q, *part[:2], out, lse, 0.3, causal=False, bias=part[2].expand(2, 1, 5, -1))
            for part in parts
        ]
    grad_q = found[0][0] + found[1][0]
    grad_k, grad_v = (torch.cat([one[which] for one in found], 2) for which in (1, 2))
    torch.testing.assert_close((grad_q, grad_k, grad_v), wanted)
