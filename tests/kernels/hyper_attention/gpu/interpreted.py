"""Helpers for tests in Triton's interpreter: how they are run, small inputs, and the expected results.

Triton reads TRITON_INTERPRET when it is imported, which other tests may have done, so the interpreted tests of each
file run in a separate process. The interpreter multiplies bf16 wrongly and runs programs one after the other, so it can
test neither bf16 nor races. fp16 and fp32 are tested in it, and bf16 on a GPU, by `python benchmarks/gpu.py correct`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.hyper_attention.reference import reference_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
PACKED = torch.tensor([[-1] * 5 + [0] * 40 + [1] * 3 + [2] * 17 + [5] * 38 + [6] + [-1] * 7, [0] * 111])


def cases(known, long):
    """The names of cases for `parametrize`; those of `long` are run by `make test-long` only."""
    return [pytest.param(name, marks=pytest.mark.long) if name in long else name for name in known]


def run_in_the_interpreter(file, marked="not long"):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", marked]
    command = [sys.executable, "-m", "pytest", *options, file]
    folder = Path(__file__).resolve().parents[4]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def poison(monkeypatch):
    """Fill uninitialised memory with NaN, or with a large number."""

    def poisoned(function):
        def create(*arguments, **options):
            x = function(*arguments, **options)
            return x.fill_(torch.nan if x.is_floating_point() else 99)

        return create

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def inputs(B, Hq, Hk, T, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Hq, T, D), (B, Hk, S, D), (B, Hk, S, D), (B, Hq, T, D), (B, Hq, T))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def truth(q, k, v, grad_out, grad_lse, plan, scale):
    tensors = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*tensors, plan, scale)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.double()).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)


def assert_near(mine, exact, tolerance):
    """Assert for each tensor that the largest difference is below the tolerance times the largest value."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, exact, strict=True):
        assert torch.equal(a.isinf(), b.isinf()), name
        a, b = a.double().masked_fill(a.isinf(), 0.0), b.masked_fill(b.isinf(), 0.0)
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name
