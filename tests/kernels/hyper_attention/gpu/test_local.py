"""The kernels of choice "nominated" in Triton's interpreter: lists equal torch's, results equal the reference."""

from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig, operator
from kernels.hyper_attention.gpu.local.kept import sizes_of, views
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

CONFIG = HyperAttentionConfig(
    mode="causal_local", choice="nominated", window=20, segment=16, num_sinks=3, lookback=16, exact_below=16
)
CASES = {
    "grouped heads": (1, 4, 2, 97, 97, 64, CONFIG, None),
    "prefix": (1, 2, 1, 70, 137, 20, CONFIG, None),
    "packed": (1, 2, 1, 111, 111, 16, CONFIG, PACKED[:1]),
    "packed, two of them": (2, 2, 1, 111, 111, 16, CONFIG, PACKED),
    "one query": (1, 2, 1, 1, 100, 16, CONFIG, None),
    "one token": (1, 1, 1, 1, 1, 64, CONFIG, None),
    "lists at their cap": (1, 1, 1, 300, 300, 16, CONFIG, None),
    "long segments, many sinks": (1, 2, 1, 200, 200, 16, replace(CONFIG, segment=32, num_sinks=20), None),
    "no look-back": (1, 2, 1, 150, 150, 16, replace(CONFIG, lookback=0), None),
    "all exact": (1, 2, 1, 90, 90, 16, replace(CONFIG, exact_below=100), None),
}  # fmt: skip
LONG = ("packed, two of them", "long segments, many sinks")


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
    """Tiles of 16 queries."""
    if INTERPRETED:
        monkeypatch.setattr("kernels.hyper_attention.plan.tiles.TILE", 16)
        poison(monkeypatch)


def step(q, k, v, grad_out, grad_lse, ids, config, scale):
    """Output, log-sum-exp, dQ, dK and dV, and the bytes of the plan."""
    from kernels.hyper_attention.gpu.local import launches

    out, lse, buffer = launches.forward(q, k, v, ids, True, config, scale)
    tensors = (grad_out, grad_lse, q, k, v, out, lse, buffer)
    return (out, lse, *launches.backward(*tensors, ids is not None, True, config, scale)), buffer


@interpreted
@pytest.mark.parametrize("name", cases(CASES, LONG))
def test_it_equals_the_reference(name):
    *shape, config, ids = CASES[name]
    q, k, v, grad_out, grad_lse = inputs(*shape)
    mine, buffer = step(q, k, v, grad_out, grad_lse, ids, config, 0.3)
    plan = operator.plan_of(q, k, ids, True, config)
    kept = views(buffer, sizes_of(q, k, ids is not None, config), q.dtype)
    if kept.listed.numel():
        some = torch.arange(kept.listed.shape[3]) < kept.counts[..., None]
        assert torch.equal(torch.where(some, kept.listed, plan.pooled.start.shape[1]), plan.lists.segment)
        assert torch.equal(torch.where(some, kept.firsts, 16), plan.lists.first)
    assert_near(mine, truth(q, k, v, grad_out, grad_lse, plan, 0.3), 5e-6)


@interpreted
def test_half_precision_any_strides_and_twice_the_same_bits():
    q, k, v, grad_out, _ = (
        x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for x in inputs(1, 2, 1, 53, 53, 60, torch.float16)
    )
    mine, _ = step(q, k.mT.contiguous().mT, v, grad_out, None, None, CONFIG, 0.1)
    again, _ = step(*(x.contiguous() for x in (q, k, v, grad_out)), None, None, CONFIG, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    assert [x.dtype for x in mine] == [torch.float16, torch.float32, *[torch.float16] * 3]


@interpreted
def test_the_future_changes_no_bit_of_the_past():
    results = []
    for edit in (0.0, 3.0):
        q, k, v, _, _ = inputs(1, 1, 1, 120, 120, 16)
        for x in (q, k, v):
            x[:, :, 90:] = x[:, :, 90:].flip(2) + edit
        mine, _ = step(q, k, v, torch.zeros_like(q), None, None, CONFIG, 0.25)
        results.append((mine[0][:, :, :90], mine[1][:, :, :90]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_double_precision_is_refused():
    with pytest.raises(ValueError, match="it must be fp16, bf16 or fp32"):
        step(*inputs(1, 1, 1, 8, 8, 16, torch.float64), None, CONFIG, 1.0)
