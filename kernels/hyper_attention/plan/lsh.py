"""Random numbers from counters, and the angular LSH of Definition 1 in arXiv:2310.05869.

There is no generator: a number depends on (seed, stream, indices) only. So a document gets the same projections and
samples whether it is alone or packed, in any batch, on any device, and nothing is copied from the host.

Shape letters: B batch, H heads, T tokens, D head size, L levels, R projections.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.threads import each_on

PROJECTIONS, SAMPLES = 1, 2
_GOLDEN = 0x9E3779B97F4A7C15
_PIECE = 8192  # tokens projected at a time: all at once would take as much memory as the queries


def uniform(seed: int, stream: int, *indices: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, one for each element of the broadcast int64 `indices`.

    Args:
        seed: any signed 64-bit number.
        stream: PROJECTIONS or SAMPLES; different streams are independent.
        indices: what the number depends on, such as level, head and slot.
    """
    state = _mix(torch.zeros_like(indices[0]) + _signed((seed * 2 + 1) * _GOLDEN + stream))
    for index in indices:
        state = _mix(state ^ (index * _signed(_GOLDEN)))
    # 53 bits, centred: exact in float64, never 0 or 1.
    return (((state >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def initial_state(seed: int, stream: int) -> int:
    """The state that `uniform` begins with, as a signed 64-bit integer, for a kernel that draws the same numbers."""
    word = _signed((seed * 2 + 1) * _GOLDEN + stream) + _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word &= (1 << 64) - 1
        word = (word ^ (word >> shift)) * factor
    word &= (1 << 64) - 1
    return _signed(word ^ (word >> 31))


def projections(seed: int, levels: int, heads: int, dimensions: int, bits: int, device: torch.device) -> Tensor:
    """Normally distributed projections, fp32 [H, D, L * R]; those of a level do not depend on the number of levels."""
    level, head, dimension, bit = (
        torch.arange(n, device=device).view([-1 if axis == i else 1 for axis in range(4)])
        for i, n in enumerate((levels, heads, dimensions, bits))
    )
    number_LHDR = uniform(seed, PROJECTIONS, level, head, dimension, bit)
    normal_LHDR = torch.erfinv(2 * number_LHDR - 1).float()
    return normal_LHDR.permute(1, 2, 0, 3).reshape(heads, dimensions, levels * bits)


def gray_buckets(x_BHTD: Tensor, projections_HDLR: Tensor, levels: int) -> Tensor:
    """Bucket of each row at each level, int32 [L, B, H, T] in 0 <= bucket < 2**R (Definition 1).

    The R signs of the projected row are a word of a Gray code; its rank in that code is the bucket, so neighbouring
    buckets differ in one sign. Computed in fp32 and without gradient: the choice of keys is not differentiated.

    Args:
        x_BHTD: queries or keys, any floating dtype.
        projections_HDLR: [Hp, D, L * R] as from `projections`, with H a multiple of Hp: grouped heads share theirs.
        levels: L.
    """
    (B, H, T, D), heads = x_BHTD.shape, projections_HDLR.shape[0]
    bits = projections_HDLR.shape[2] // levels
    # Row l adds the signs of level l as the digits of its word: exact in fp32, and in TF32.
    eye, digits = torch.eye(levels, device=x_BHTD.device), 2.0 ** torch.arange(bits, device=x_BHTD.device)
    places = torch.kron(eye, digits[None])
    word = torch.empty((levels, B, H, T), dtype=torch.int32, device=x_BHTD.device)

    def hash_piece(first: int) -> None:
        rows = x_BHTD[:, :, first : first + _PIECE].detach().float().reshape(B, heads, H // heads, -1, D)
        sign = (projections_HDLR.mT[:, None] @ rows.mT).gt_(0)
        piece = (places @ sign).flatten(1, 2).to(torch.int32)
        for shift in (1, 2, 4, 8):
            piece ^= piece >> shift
        word[..., first : first + _PIECE] = piece.permute(2, 0, 1, 3)

    each_on(x_BHTD.device, hash_piece, range(0, T, _PIECE))
    return word


def _mix(words: Tensor) -> Tensor:
    """splitmix64's finaliser on int64; torch shifts arithmetically, so the copied sign bits are masked off."""
    words = words + _signed(_GOLDEN)
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
