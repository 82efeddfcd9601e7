"""Sizes of a call in mode "paper" on a GPU, and what its backward pass gets from the forward pass.

Orders, draws and the bounds of documents lie in one tensor of bytes, so that the operator has one output for them.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, L levels, M draws, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig

CHUNK = 1024  # tokens that are sorted at a time
PIECE = 8192  # queries of a program that owns draws
_ALIGNED = 16


@dataclass(frozen=True)
class Sizes:
    """What follows from shapes and configuration; named by the shape letters. Slots are those of `ranges.py`."""

    B: int
    Hq: int
    Hk: int
    T: int
    S: int
    D: int
    causal: bool
    packed: bool
    config: HyperAttentionConfig
    chunk: int = CHUNK
    piece: int = PIECE

    @property
    def exact_limit(self) -> int:
        """Documents of at most this many tokens are exact; fits into 32 bits."""
        return min(self.config.exact_limit, (1 << 31) - 2)

    @property
    def L(self) -> int:
        """Levels."""
        S = int(self.S)
        if self.exact_limit >= S:
            return 0
        return ((S - 1) // self.config.leaf).bit_length() if self.causal else 1

    @property
    def leaf(self) -> int:
        """Tokens of a tile at level 0; without a mask the longest side."""
        return self.config.leaf if self.causal else max(self.S, self.T)

    @property
    def M(self) -> int:
        """Draws of a segment."""
        return self.config.num_samples

    @property
    def direct(self) -> bool:
        """Whether the one level writes the result itself."""
        return not self.causal and not self.packed and self.L == 1

    def slots(self, level: int) -> int:
        """Slots of segments at a level."""
        h = self.leaf << level
        if not self.causal:
            return -(-self.S // (self.exact_limit + 1)) if self.packed else 1
        return -(-self.S // h) if self.packed else -(-self.S // h) // 2

    def rows(self, queries: bool) -> int:
        """Rows that the levels write for a head: one for each token of each slot's tile."""
        if not self.causal:
            return self.T if queries else self.S
        return sum(self.slots(level) * (self.leaf << level) for level in range(self.L))

    def programs(self, unit: int, each: int = 1) -> int:
        """Programs over all levels, `each` for each `unit` tokens of a slot's tile."""
        return sum(self.slots(level) * -(-(self.leaf << level) // unit) * each for level in range(self.L))

    @property
    def segments(self) -> int:
        """Slots of all levels."""
        return sum(self.slots(level) for level in range(self.L))


@dataclass(frozen=True)
class Kept:
    """Views of the bytes; an unused one is empty.

    Attributes:
        query_order: int32 [L, B, Hq, T], query at each place of its level's tiles; unset outside of them.
        key_order: int32 [L, B, Hk, S], key at each place, likewise.
        ranks: int32 [B, Hk, segments, M], draws as ranks among the keys outside the block.
        starts, stops: int32 [B, S], the document of each token; of size 0 without documents.
    """

    query_order: Tensor
    key_order: Tensor
    ranks: Tensor
    starts: Tensor
    stops: Tensor


def sizes_of(q: Tensor, k: Tensor, causal: bool, packed: bool, config: HyperAttentionConfig) -> Sizes:
    """Sizes of a call."""
    (B, Hq, T, D), (Hk, S) = q.shape, k.shape[1:3]
    return Sizes(B, Hq, Hk, T, S, D, causal, packed, config)


def kept_bytes(sizes: Sizes) -> int:
    """Bytes of the tensor."""
    return sum(_aligned(4 * count) for count, _ in _shapes(sizes))


def views(buffer: Tensor, sizes: Sizes) -> Kept:
    """The bytes, uint8, as tensors."""
    found, offset = [], 0
    for count, shape in _shapes(sizes):
        found.append(buffer[offset : offset + 4 * count].view(torch.int32).view(shape))
        offset += _aligned(4 * count)
    return Kept(*found)


def _shapes(s: Sizes) -> list[tuple[int, tuple[int, ...]]]:
    """Elements and shape of each view."""
    documents = (s.B, s.S if s.packed else 0)
    shapes: list[tuple[int, ...]] = [
        (s.L, s.B, s.Hq, s.T), (s.L, s.B, s.Hk, s.S), (s.B, s.Hk, s.segments, s.M), documents, documents
    ]  # fmt: skip
    counts = []
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        counts.append((count, shape))
    return counts


def _aligned(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED
