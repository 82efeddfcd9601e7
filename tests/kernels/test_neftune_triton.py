"""NEFTune's Triton kernel: the bits of the torch path in the interpreter, one launch, code for an H100 without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels.neftune import EmbeddingNoise, batch_of_pack, neftune, scaled_noise, slice_of_batch, word_of
from tests.kernels.hyper_attention.gpu.interpreted import INTERPRETED, interpreted, poison, run_in_the_interpreter
from tests.kernels.hyper_attention.gpu.test_launches import Launches

KINDS = ("uniform", "gaussian", "symmetric")
LENGTHS, UIDS, TOKENS = [3, 20, 9], [11, -(2**63), 2**62 + 5], 35
compiled = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter")


def pack(epoch=1):
    return batch_of_pack(LENGTHS, UIDS, TOKENS, epoch)


def noisy(output, batch, kind, seed=7):
    from kernels.neftune_triton import add_noise

    return add_noise(output, batch, 5.0, word_of(seed, batch.epoch), kind)


@compiled
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@interpreted
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float16), (300, torch.float32)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_that_of_the_torch_path(monkeypatch, kind, size, dtype):
    batch, expected = pack(), scaled_noise(pack(), size, 5.0, 7, kind)
    output = (torch.randn(1, TOKENS, size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    poison(monkeypatch)
    found, squares = noisy(output, batch, kind)
    alone, _ = noisy(torch.zeros(1, TOKENS, size), batch, kind)
    assert found.dtype == dtype
    if kind == "gaussian":  # another polynomial
        torch.testing.assert_close(alone, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(found, (output.float() + expected).to(dtype), rtol=1e-3, atol=1e-6)
    else:
        assert torch.equal(alone, expected)
        assert torch.equal(found, (output.float() + expected).to(dtype))
    torch.testing.assert_close(squares, expected.square().sum(-1)[0])


@interpreted
def test_rows_slices_and_strides_make_no_difference():
    whole, _ = noisy(torch.zeros(1, TOKENS, 64), pack(), "uniform")
    part = slice_of_batch(pack(), slice(10, 30))
    strided = torch.zeros(1, 64, 20).transpose(1, 2)
    assert torch.equal(noisy(strided, part, "uniform")[0], whole[:, 10:30])
    assert not noisy(torch.zeros(1, 5, 64), batch_of_pack([], [], 5, 0), "gaussian")[0].any()


@interpreted
def test_the_hook_takes_the_kernel_on_a_gpu_and_its_gradient_is_the_identity(monkeypatch):
    tokens, found = torch.arange(TOKENS)[None], []
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        torch.manual_seed(0)
        embedding = nn.Embedding(TOKENS, 64).train()
        with neftune(embedding, 5.0, seed=7, gain=3.0) as noise:
            noise.set_batch(pack())
            output = embedding(tokens)
            output.backward(torch.arange(output.numel()).reshape(output.shape).float())
            found.append((output, embedding.weight.grad, noise.l2_per_document()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1].flatten().tolist() == list(range(TOKENS * 64))


@compiled
def test_the_hook_has_three_launches_whatever_the_pack(monkeypatch):
    from triton.runtime.jit import JITFunction

    for lengths in ([200], [10] * 20):
        noise = EmbeddingNoise(5.0, 0)
        noise.set_batch(batch_of_pack(lengths, [*range(len(lengths))], 200, 0))
        output, embedding = torch.zeros(1, 200, 64), nn.Embedding(2, 2).train()
        with monkeypatch.context() as patch, Launches() as mode:
            patch.setattr(JITFunction, "run", lambda self, *a, **o: mode.found.update([self.fn.__name__]))
            patch.setattr(torch.Tensor, "is_cuda", True)
            noise(embedding, (), output)
        assert dict(mode.found) == {"add_noise_kernel": 1, "zeros": 1, "index_add_": 1}


@compiled
@pytest.mark.slow
def test_an_h100_needs_no_stack_no_atomics_and_fuses_no_product():
    report = Path(__file__).resolve().parents[2] / "benchmarks" / "aot_report.py"
    command = [sys.executable, str(report), "--json", "--targets", "sm_90", "--sizes", "64", "--kinds", "neftune"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kernel"] for row in rows] == [f"add_noise, {kind}" for kind in KINDS]
    for row in rows:
        assert (row["stack"], row["spills"], row["atomics"], row["fused"]) == (0, 0, 0, 0), row
