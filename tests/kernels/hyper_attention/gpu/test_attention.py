"""The Triton path against the reference, in Triton's interpreter on a CPU: outputs, log-sum-exps and gradients.

Triton reads TRITON_INTERPRET when it is imported, which other tests may have done: the tests of this file run in a
process of their own. The interpreter multiplies bf16 wrongly and runs programs in turn: it sees neither bf16 nor races.
fp16 and fp32 are tested here; bf16 is compiled (test_triton_aot.py); each row of a result is written by one program.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.operator import _path
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.tables import build_plan
from kernels.hyper_attention.reference import reference_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")

PAPER = HyperAttentionConfig(block_size=16, num_samples=6, num_projections=3, leaf=16, exact_below=16)
MEANS = HyperAttentionConfig(
    mode="causal_local", window=20, segment=8, num_sinks=3, lookback=24, num_projections=2, exact_below=16
)
LSH = replace(MEANS, choice="lsh", lookback=9)
NO_LOOKBACK = replace(MEANS, lookback=0)
# More segments than a tile holds: some tiles of means need no mask but that of the chosen ones.
MANY = replace(MEANS, segment=4, lookback=8)
PACKED = torch.tensor([[-1] * 5 + [0] * 40 + [1] * 3 + [2] * 17 + [5] * 38 + [6] + [-1] * 7, [0] * 111])

CASES = {
    "full": (1, 2, 1, 111, 111, 16, False, PAPER, None),
    "full, fewer keys": (1, 2, 2, 111, 63, 60, False, PAPER, None),
    "full, many samples": (1, 1, 1, 97, 140, 16, False, replace(PAPER, block_size=40, num_samples=40), None),
    "full, no samples": (1, 1, 1, 63, 63, 16, False, replace(PAPER, num_samples=0), None),
    "full, packed": (2, 2, 1, 111, 111, 16, False, PAPER, PACKED),
    "causal": (1, 4, 2, 63, 63, 80, True, PAPER, None),
    "causal, prefix": (1, 2, 1, 100, 137, 20, True, PAPER, None),
    "causal, packed": (2, 2, 1, 111, 111, 16, True, PAPER, PACKED),
    "causal, one query": (1, 2, 1, 1, 100, 16, True, PAPER, None),
    "one token": (1, 1, 1, 1, 1, 64, True, PAPER, None),
    "means": (1, 4, 2, 97, 97, 64, True, MEANS, None),
    "means, prefix": (1, 2, 1, 70, 137, 20, True, MEANS, None),
    "means, packed": (2, 2, 1, 111, 111, 16, True, MEANS, PACKED),
    "means, one query": (1, 2, 1, 1, 100, 16, True, MEANS, None),
    "means, many segments": (1, 2, 1, 250, 250, 16, True, MANY, None),
    "means, one segment": (1, 2, 1, 63, 63, 16, True, replace(MEANS, lookback=8), None),
    "lsh": (1, 4, 2, 97, 97, 16, True, LSH, None),
    "lsh, prefix": (1, 2, 1, 70, 137, 20, True, LSH, None),
    "lsh, packed": (2, 2, 1, 111, 111, 16, True, LSH, PACKED),
    "no look-back": (1, 2, 1, 63, 63, 16, True, NO_LOOKBACK, None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__]
    folder = Path(__file__).resolve().parents[4]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device is meta; it must be cpu or cuda"):
        _path(torch.device("meta"))


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Steps of 16 queries; several programs for one tile of compact keys; uninitialised memory is NaN."""
    if not INTERPRETED:
        return
    from kernels.hyper_attention.gpu import attention as gpu_attention

    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    monkeypatch.setattr(gpu_attention, "_PIECE_ROWS", 40)

    def poisoned(function):
        def create(*arguments, **options):
            x = function(*arguments, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return create

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def inputs(B, Hq, Hk, T, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Hq, T, D), (B, Hk, S, D), (B, Hk, S, D), (B, Hq, T, D), (B, Hq, T))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plan_of(q, k, causal, config, ids):
    documents = whole(k.shape[0], k.shape[2], k.device) if ids is None else of_ids(ids)
    if config.mode == "causal_local":
        return build_local_plan(q, k, documents, config)
    return build_plan(q, k, causal, documents, config)


def triton_path(q, k, v, grad_out, grad_lse, plan, scale):
    """Output, log-sum-exp, dQ, dK, dV."""
    path = _interpreted_path()
    out, lse = path.forward(q, k, v, plan, scale)
    return out, lse, *path.backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)


def _interpreted_path():
    from kernels.hyper_attention.gpu import attention as gpu_attention

    return gpu_attention


def truth(q, k, v, grad_out, grad_lse, plan, scale):
    tensors = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*tensors, plan, scale)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.double()).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)


def assert_near(mine, exact, tolerance):
    """Largest difference below the tolerance times the largest value, for each tensor."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, exact, strict=True):
        assert torch.equal(a.isinf(), b.isinf()), name
        a, b = a.double().masked_fill(a.isinf(), 0.0), b.masked_fill(b.isinf(), 0.0)
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference(name):
    *shape, causal, config, ids = CASES[name]
    q, k, v, grad_out, grad_lse = inputs(*shape)
    plan = plan_of(q, k, causal, config, ids)
    mine = triton_path(q, k, v, grad_out, grad_lse, plan, 0.3)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (mine[0], *mine[2:]))
    assert_near(mine, truth(q, k, v, grad_out, grad_lse, plan, 0.3), 5e-6)


@interpreted
@pytest.mark.parametrize(("config", "causal"), [(PAPER, False), (PAPER, True), (MEANS, True)])
def test_half_precision_any_strides_and_twice_the_same_bits(config, causal):
    q, k, v, grad_out, _ = (
        x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for x in inputs(1, 2, 1, 63, 63, 60, torch.float16)
    )
    k = k.mT.contiguous().mT
    plan = plan_of(q, k, causal, config, None)
    mine = triton_path(q, k, v, grad_out, None, plan, 0.1)
    again = triton_path(*(x.contiguous() for x in (q, k, v, grad_out)), None, plan, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    assert [x.dtype for x in mine] == [torch.float16, torch.float32, *[torch.float16] * 3]
    assert_near(mine, truth(q, k, v, grad_out, None, plan, 0.1), 4e-3)


@interpreted
@pytest.mark.parametrize("size", [1e3, 0.0])
def test_extreme_logits_stay_finite(size):
    q, k, v, grad_out, grad_lse = inputs(1, 1, 1, 63, 63, 16)
    for config, causal in ((PAPER, True), (MEANS, True)):
        plan = plan_of(q, k, causal, config, None)
        assert all(x.isfinite().all() for x in triton_path(q * size, k, v, grad_out, grad_lse, plan, 0.25))


@interpreted
def test_double_precision_is_refused():
    q, k, v, _, _ = inputs(1, 1, 1, 8, 8, 16, torch.float64)
    with pytest.raises(ValueError, match="it must be fp16, bf16 or fp32"):
        _interpreted_path().forward(q, k, v, plan_of(q, k, True, PAPER, None), 1.0)


@interpreted
@pytest.mark.parametrize(("config", "tolerance"), [(NO_LOOKBACK, 0.0), (MANY, 0.0), (LSH, 1e-6)])
def test_the_future_does_not_change_the_past(config, tolerance):
    """Bit for bit, save for look-back by LSH: later tokens move the sorted keys, and sums round in another order."""
    results = []
    for edit in (0.0, 3.0):
        q, k, v, _, _ = inputs(1, 1, 1, 250, 250, 16)
        for x in (q, k, v):
            x[:, :, 170:] = x[:, :, 170:].flip(2) + edit
        out, lse = _interpreted_path().forward(q, k, v, plan_of(q, k, True, config, None), 0.25)
        results.append((out[:, :, :170], lse[:, :, :170]))
    torch.testing.assert_close(*results, rtol=0.0, atol=tolerance)
