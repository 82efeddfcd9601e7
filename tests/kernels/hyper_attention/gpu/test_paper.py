"""The kernels of mode "paper" in Triton's interpreter: draws and orders equal torch's, results equal the reference."""

from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.tables import build_plan
from tests.kernels.hyper_attention.gpu.interpreted import (
    INTERPRETED,
    PACKED,
    assert_near,
    cases,
    inputs,
    interpreted,
    poison,
    run_in_the_interpreter,
    truth,
)

PAPER = HyperAttentionConfig(block_size=16, num_samples=6, num_projections=3, leaf=16, exact_below=16)
CASES = {
    "full": (1, 2, 1, 111, 111, 16, False, PAPER, None),
    "full, fewer keys": (1, 2, 2, 63, 47, 60, False, PAPER, None),
    "full, many samples": (1, 1, 1, 97, 140, 16, False, replace(PAPER, block_size=40, num_samples=40), None),
    "full, no samples": (1, 1, 1, 63, 63, 16, False, replace(PAPER, num_samples=0), None),
    "full, packed": (1, 2, 1, 111, 111, 16, False, PAPER, PACKED[:1]),
    "full, two packs": (2, 2, 1, 111, 111, 16, False, PAPER, PACKED),
    "causal": (1, 4, 2, 63, 63, 80, True, PAPER, None),
    "causal, prefix": (1, 2, 1, 100, 137, 20, True, PAPER, None),
    "causal, packed": (1, 2, 1, 111, 111, 16, True, PAPER, PACKED[:1]),
    "causal, two packs": (2, 2, 1, 111, 111, 16, True, PAPER, PACKED),
    "causal, one query": (1, 2, 1, 1, 100, 16, True, PAPER, None),
    "one token": (1, 1, 1, 1, 1, 64, True, PAPER, None),
}
LONG = ("full", "full, two packs", "causal, two packs", "full, many samples", "causal, prefix")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_longer_cases_in_the_interpreter():
    run_in_the_interpreter(__file__, "long")


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Sort chunks of 32 tokens at a time, and draw for pieces of 48 queries."""
    if INTERPRETED:
        from kernels.hyper_attention.gpu.paper import kept, launches

        found = kept.sizes_of
        monkeypatch.setattr(launches, "sizes_of", lambda *a: replace(found(*a), chunk=32, piece=48))
        poison(monkeypatch)


def step(q, k, v, grad_out, grad_lse, ids, causal, config, scale):
    """Output, log-sum-exp, dQ, dK and dV, and the buckets of queries and keys."""
    from kernels.hyper_attention.gpu.paper import launches

    out, lse, buffer = launches.forward(q, k, v, ids, causal, config, scale)
    tensors = (grad_out, grad_lse, q, k, v, out, lse, buffer)
    grads = launches.backward(*tensors, ids is not None, causal, config, scale)
    call = launches.call_of(q, k, v, causal, ids is not None, config, scale)
    found = launches.buckets(call, launches.views(buffer, call.sizes)) if call.sizes.L else None
    return (out, lse, *grads), found


@interpreted
@pytest.mark.parametrize("name", cases(CASES, LONG))
def test_it_equals_the_reference(name):
    *shape, causal, config, ids = CASES[name]
    q, k, v, grad_out, grad_lse = inputs(*shape)
    mine, found = step(q, k, v, grad_out, grad_lse, ids, causal, config, 0.3)
    documents = whole(k.shape[0], k.shape[2], k.device) if ids is None else of_ids(ids)
    plan = build_plan(q, k, causal, documents, config, found and tuple(x.int() for x in found))
    assert_near(mine, truth(q, k, v, grad_out, grad_lse, plan, 0.3), 5e-6)


@interpreted
def test_half_precision_hashes_as_fp32_does():
    """Three half-precision parts of a projection together have all digits of fp32."""
    q, k, v, grad_out, _ = inputs(1, 1, 1, 47, 47, 60, torch.float16)
    mine, found = step(q, k, v, grad_out, None, None, False, PAPER, 0.1)
    again, _ = step(q, k, v, grad_out, None, None, False, PAPER, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    _, wide = step(*(x.float() for x in (q, k, v, grad_out)), None, None, False, PAPER, 0.1)
    assert all((a != b).float().mean() < 0.01 for a, b in zip(found, wide, strict=True))
