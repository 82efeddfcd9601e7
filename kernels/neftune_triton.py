"""NEFTune's noise on a GPU: hash, distribution, scale, sum and squares in one launch that writes no noise to memory.

It adds the same bits as the torch path of `neftune.py` on a CPU for uniform and symmetric noise. For gaussian noise the
inverse error function is another polynomial, so an element of the noise differs by up to 2e-6 of itself.
The gradient of the embedding's output is that of the sum, since the noise does not depend on it.

Shape letters: B rows, T tokens, D embedding size, N documents.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("uniform", "gaussian", "symmetric")
TOKENS, COLUMNS, WARPS = 4, 256, 4  # of a program; not timed on a GPU
_GOLDEN_64 = tl.constexpr(0x9E3779B97F4A7C15)
_GOLDEN_32 = tl.constexpr(0x9E3779B9)


def add_noise(output_BTD: Tensor, batch: Any, alpha: float, word: int, kind: str) -> tuple[Tensor, Tensor]:
    """The output plus noise, computed in fp32 and rounded once, and the squares of the noise.

    Args:
        output_BTD: of the embedding, on a GPU; fp32, bf16 or fp16.
        batch: a `neftune.NoiseBatch` on the same device.
        alpha: strength of the noise.
        word: of seed and epoch, a signed 64-bit number.
        kind: one of KINDS.

    Returns:
        [B, T, D] in the output's dtype; [B * T] in fp32, the sum of the squares of each token's noise.
    """
    noisy, squares = _AddNoise.apply(output_BTD, batch, alpha, word, kind)
    return noisy, squares


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_BTD: Tensor, batch: Any, alpha: float, word: int, kind: str) -> tuple[Tensor, Tensor]:
        noisy, squares = launch(output_BTD, batch, alpha, word, kind)
        ctx.mark_non_differentiable(squares)
        return noisy, squares

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return grads[0], None, None, None, None


def launch(output_BTD: Tensor, batch: Any, alpha: float, word: int, kind: str) -> tuple[Tensor, Tensor]:
    """The one launch of `add_noise`; products and sums are not fused in it, so that they round as in torch."""
    output = output_BTD.contiguous()
    tokens, size = output.shape[0] * output.shape[1], output.shape[2]
    noisy, squares = output.new_empty(output.shape), output.new_empty(tokens, dtype=torch.float32)
    parts = [part.contiguous() for part in (batch.documents, batch.positions, batch.padding)]
    with torch.cuda.device(output.device) if output.device.type == "cuda" else nullcontext():
        add_noise_kernel[(triton.cdiv(tokens, TOKENS),)](
            output, noisy, squares, *parts, batch.lengths, batch.uids, word, alpha, tokens, size,
            KIND=KINDS.index(kind), BT=TOKENS, BD=min(COLUMNS, triton.next_power_of_2(size)),
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return noisy, squares


@triton.jit(do_not_specialize=["word", "tokens"])
def add_noise_kernel(
    output, noisy, squares, documents, positions, padding, lengths, uids, word, alpha, tokens, D,
    KIND: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each program owns BT tokens and reads their columns BD at a time."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = token < tokens
    real = inside & (tl.load(padding + token, mask=inside, other=1) == 0)
    document = tl.load(documents + token, mask=real, other=0)
    length = tl.load(lengths + document, mask=real, other=0)
    root = tl.sqrt_rn(tl.maximum(length * D, 1).to(tl.float32))
    scale = tl.where(length > 0, alpha * tl.div_rn(1.0, root), 0.0)
    uid = tl.load(uids + document, mask=real, other=0)
    position = tl.load(positions + token, mask=real, other=0)
    key = _mix_64((uid ^ word).to(tl.uint64, bitcast=True))
    key = _mix_64(key + position.to(tl.uint64, bitcast=True) * _GOLDEN_64)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    total = tl.zeros([BT], tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        place = token[:, None] * D + column[None, :]
        valid = inside[:, None] & (column < D)[None, :]
        word_32 = _mix_32(low[:, None] + (column.to(tl.uint32) * _GOLDEN_32)[None, :])
        word_32 = _mix_32(word_32 ^ high[:, None])
        unit = ((word_32.to(tl.int32, bitcast=True) >> 8).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        noise = tl.where(valid, _shaped(unit, KIND) * scale[:, None], 0.0)
        sum = tl.load(output + place, mask=valid, other=0.0).to(tl.float32) + noise
        tl.store(noisy + place, sum.to(noisy.dtype.element_ty), mask=valid)
        total += tl.sum(noise * noise, 1)
    tl.store(squares + token, total, mask=inside)


@triton.jit
def _shaped(unit, KIND: tl.constexpr):
    """The same draws in the distribution of the kind, with mean 0 and variance 1/3."""
    if KIND == 1:
        return _inverse_error_function(unit) * 0.816496580927726
    if KIND == 2:
        return tl.where(unit > 0, 0.5773502691896257, -0.5773502691896257)
    return unit


@triton.jit
def _inverse_error_function(x):
    """M. Giles, Approximating the erfinv function, GPU Computing Gems, 2010: single precision, both branches."""
    w = -tl.log((1.0 - x) * (1.0 + x))
    near = w - 2.5
    p = 2.81022636e-08
    p = 3.43273939e-07 + p * near
    p = -3.5233877e-06 + p * near
    p = -4.39150654e-06 + p * near
    p = 0.00021858087 + p * near
    p = -0.00125372503 + p * near
    p = -0.00417768164 + p * near
    p = 0.246640727 + p * near
    p = 1.50140941 + p * near
    far = tl.sqrt(tl.maximum(w, 5.0)) - 3.0
    q = -0.000200214257
    q = 0.000100950558 + q * far
    q = 0.00134934322 + q * far
    q = -0.00367342844 + q * far
    q = 0.00573950773 + q * far
    q = -0.0076224613 + q * far
    q = 0.00943887047 + q * far
    q = 1.00167406 + q * far
    q = 2.83297682 + q * far
    return tl.where(w < 5.0, p, q) * x


@triton.jit
def _mix_64(words):
    """splitmix64's finaliser on uint64."""
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
    words = (words ^ (words >> 27)) * 0x94D049BB133111EB
    return words ^ (words >> 31)


@triton.jit
def _mix_32(words):
    """murmur3's finaliser on uint32."""
    words = (words ^ (words >> 16)) * 0x85EBCA6B
    words = (words ^ (words >> 13)) * 0xC2B2AE35
    return words ^ (words >> 16)
