"""Sizes of a call with choice "nominated", and what its backward pass gets from the forward pass.

Means, lists and the bounds of documents lie in one tensor of bytes, so that the operator always has one output for
them. Without documents it takes 2 / L of the bytes of keys and values, and 12 C + P bytes for each tile and head.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, N slots of tiles, C entries of a
list, L tokens of a segment, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.plan import tiles
from kernels.hyper_attention.plan.nominate import list_entries

_ALIGNED = 16


@dataclass(frozen=True)
class Sizes:
    """What follows from shapes and configuration; named by the shape letters."""

    B: int
    Hq: int
    Hk: int
    T: int
    S: int
    D: int
    item_bytes: int
    packed: bool
    config: HyperAttentionConfig

    @property
    def exact_limit(self) -> int:
        """Documents of at most this many tokens are exact; fits into 32 bits."""
        return min(max(self.config.exact_limit, tiles.TILE), (1 << 31) - 2)

    @property
    def exact(self) -> bool:
        """Whether all documents are exact because the whole row is short enough."""
        return self.exact_limit >= self.S

    @property
    def window(self) -> int:
        """Minimum number of exact keys before a tile."""
        return self.S if self.exact else self.config.window

    @property
    def P(self) -> int:
        """Segments that means and lists are stored for."""
        return 0 if self.exact else self.S // self.config.segment

    @property
    def C(self) -> int:
        """Entries of a list."""
        return list_entries(self.config) if self.P else 0

    @property
    def first_block(self) -> int:
        """Number of the first block of TILE positions with a query."""
        return (self.S - self.T) // tiles.TILE

    @property
    def blocks(self) -> int:
        """Blocks of TILE positions with queries."""
        return (self.S + tiles.TILE - 1) // tiles.TILE - self.first_block

    @property
    def N(self) -> int:
        """Slots of tiles."""
        return self.blocks * (2 if self.packed else 1)

    @property
    def programs(self) -> int:
        """Slots that programs work on: with documents each block has one more, for its exact and padding rows."""
        return self.blocks * (3 if self.packed else 1)


@dataclass(frozen=True)
class Kept:
    """Views of the bytes; an unused one is empty.

    Attributes:
        mean_k, mean_v: [B, Hk, P, D] in the dtype of k.
        listed: int32 [B, Hq, N, C], segment of each entry of a tile's list.
        firsts: int32 [B, Hq, N, C], the first row that reads it.
        counts: int32 [B, Hq, N], entries.
        first_of: uint8 [B, Hq, N, P], the first row that reads a segment, 255: none does.
        starts, stops: int32 [B, S], the document of each token; of size 0 without documents.
    """

    mean_k: Tensor
    mean_v: Tensor
    listed: Tensor
    firsts: Tensor
    counts: Tensor
    first_of: Tensor
    starts: Tensor
    stops: Tensor


def sizes_of(q: Tensor, k: Tensor, packed: bool, config: HyperAttentionConfig) -> Sizes:
    """Sizes of a call."""
    (B, Hq, T, D), (Hk, S) = q.shape, k.shape[1:3]
    return Sizes(B, Hq, Hk, T, S, D, q.element_size(), packed, config)


def kept_bytes(sizes: Sizes) -> int:
    """Bytes of the tensor."""
    return sum(_aligned(count * bytes_) for count, bytes_ in _counts(sizes))


def views(buffer: Tensor, sizes: Sizes, dtype: torch.dtype) -> Kept:
    """The bytes as tensors.

    Args:
        buffer: uint8, as many as `kept_bytes`.
        sizes: of the call.
        dtype: of k.
    """
    s, documents = sizes, (sizes.B, sizes.S if sizes.packed else 0)
    mean, entries = (s.B, s.Hk, s.P, s.D), (s.B, s.Hq, s.N, s.C)
    shapes = [
        (mean, dtype), (mean, dtype), (entries, torch.int32), (entries, torch.int32),
        ((s.B, s.Hq, s.N if s.C else 0), torch.int32), ((s.B, s.Hq, s.N, s.P if s.C else 0), torch.uint8),
        (documents, torch.int32), (documents, torch.int32),
    ]  # fmt: skip
    found, offset = [], 0
    for (shape, kind), (count, bytes_) in zip(shapes, _counts(sizes), strict=True):
        found.append(buffer[offset : offset + count * bytes_].view(kind).view(shape))
        offset += _aligned(count * bytes_)
    return Kept(*found)


def _counts(s: Sizes) -> list[tuple[int, int]]:
    """Elements and bytes of an element of each view."""
    mean, entries, documents = s.B * s.Hk * s.P * s.D, s.B * s.Hq * s.N * s.C, s.B * s.S * s.packed
    slots = s.B * s.Hq * s.N * (s.C > 0)
    return [
        (mean, s.item_bytes), (mean, s.item_bytes), (entries, 4), (entries, 4), (slots, 4), (slots * s.P, 1),
        (documents, 4), (documents, 4),
    ]  # fmt: skip


def _aligned(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED
