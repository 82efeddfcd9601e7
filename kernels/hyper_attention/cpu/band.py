"""The band on a CPU: each tile of queries with a common first key reads older keys in full and its own causally.

Tiles that follow each other at equal steps form a strip. One call computes a few tiles of a strip on strided views:
nothing is copied, even where tiles overlap, and what a call returns stays in the cache.

Shape letters: G query heads, T queries, S keys, D head size, N tiles, R rows, C keys of a tile, M hidden keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.hyper_attention.cpu.flash import merge_, part_backward, part_forward
from kernels.hyper_attention.cpu.heads import Gradients, Head
from kernels.hyper_attention.plan.pooling import log_counts
from kernels.hyper_attention.plan.tables import Band, Pooled

_HIDDEN = -1e30
_CACHED_ROWS = 8192


@dataclass
class _Strip:
    """`count` tiles of `rows` queries from `row` on against `keys` keys from `key` on, the next `step` keys later."""

    row: int
    rows: int
    key: int
    keys: int
    causal: bool
    step: int = 0
    count: int = 1

    def pieces(self) -> Iterator["_Strip"]:
        """The strip, a few tiles at a time."""
        most = max(1, _CACHED_ROWS // max(self.rows, self.keys))
        for first in range(0, self.count, most):
            row, key, count = self.row + self.rows * first, self.key + self.step * first, min(most, self.count - first)
            yield replace(self, row=row, key=key, count=count)

    def query_tiles(self, x: Tensor) -> Tensor:
        """View [N, 1, R, ...] of x [T, ...]."""
        return x[self.row : self.row + self.rows * self.count].view(self.count, 1, self.rows, *x.shape[1:])

    def key_tiles(self, x: Tensor) -> Tensor:
        """View [N, 1, C, D] of x [S, D]; tiles may overlap."""
        piece = x[self.key : self.key + self.step * (self.count - 1) + self.keys]
        return piece.unfold(0, self.keys, max(self.step, 1)).mT[:, None]

    def bias(self, log_weight: Tensor, hidden: Tensor | None) -> Tensor:
        """View [N, 1, 1, C] of log_weight [S]; with hidden [T, M] the sum [N, 1, R, C] of both."""
        bias = self.key_tiles(log_weight[:, None]).mT
        if hidden is None:
            return bias
        first = self.key + self.step * torch.arange(self.count)
        column = self.query_tiles(hidden).long() - first[:, None, None, None]
        column = torch.where((column >= 0) & (column < self.keys), column, self.keys)
        # If all keys of a row are hidden, its log-sum-exp must stay finite for the merge, which gives it no weight.
        mask = bias.new_zeros(*column.shape[:3], self.keys + 1).scatter_(3, column, _HIDDEN)
        return mask[..., : self.keys] + bias


def band_forward(head: Head, band: Band, pooled: Pooled | None = None, hidden: Tensor | None = None) -> None:
    """Merge the band [B, T] into `head.out` and `head.lse`, in place.

    If `pooled` is given, the band's keys are the means of its segments; a query does not read those that `hidden`
    [G, T, M] names.
    """
    for strip, key, value, member, bias in _calls(head, band, pooled, hidden):
        part = part_forward(strip.query_tiles(head.q[member]), key, value, head.scale, strip.causal, bias)
        merge_(strip.query_tiles(head.out[member]), strip.query_tiles(head.lse[member]), *part)


def band_backward(
    head: Head, grads: Gradients, band: Band, pooled: Pooled | None = None, hidden: Tensor | None = None
) -> None:
    """Add the band's share to `grads`, in place; arguments as in `band_forward`."""
    for strip, key, value, member, bias in _calls(head, band, pooled, hidden):
        grad_out, q, out, lse = (strip.query_tiles(x[member]) for x in (grads.out, head.q, head.out, head.lse))
        parts = part_backward(grad_out, q, key, value, out, lse, head.scale, strip.causal, bias)
        strip.query_tiles(grads.q[member]).add_(parts[0])
        for grad, part in zip((grads.k, grads.v), parts[1:], strict=True):
            _add_tiles(strip, grad, part)


def _calls(
    head: Head, band: Band, pooled: Pooled | None, hidden: Tensor | None
) -> Iterator[tuple[_Strip, Tensor, Tensor, int, Tensor | None]]:
    """Some tiles, their keys and values, the query head that reads them, and the bias of its logits."""
    log_weight = None if pooled is None else log_counts(pooled)[head.row]
    for strip in _strips(band.start[head.row], band.stop[head.row]):
        for piece in strip.pieces():
            for member in range(len(head.q)):
                own = None if hidden is None else hidden[member]
                bias = None if log_weight is None else piece.bias(log_weight, own)
                yield piece, piece.key_tiles(head.k), piece.key_tiles(head.v), member, bias


def _add_tiles(strip: _Strip, grad: Tensor, part: Tensor) -> None:
    """Add `part` [N, 1, C, D] to the rows of `grad` that are each tile's keys; tiles that overlap are added in turn."""
    turns = 1 if strip.step >= strip.keys else -(-strip.keys // max(strip.step, 1))
    for turn in range(min(turns, strip.count)):
        tiles = strip.key_tiles(grad)[turn::turns]
        tiles.add_(part[turn::turns])


def _strips(start: Tensor, stop: Tensor) -> list[_Strip]:
    """The band [T] as tiles: queries with a common first key, whose last key is common too or is the query's own.

    Where each query ends at its own key, a tile is two: all older keys in full, then the queries' own keys causally.
    """
    strips: list[_Strip] = []
    grows = stop.diff()
    cut = (start.diff() != 0) | (grows > 1)
    cut[1:] |= (grows[1:] != grows[:-1]) & ~cut[:-1]
    edges = [0, *(cut.nonzero().flatten() + 1).tolist(), len(start)]
    for row, end in pairwise(edges):
        key, begin, last, rows = int(start[row]), int(stop[row]), int(stop[end - 1]), end - row
        if last == begin > key:
            _append(strips, _Strip(row, rows, key, last - key, causal=False))
        elif last > begin:
            if begin - 1 > key:
                _append(strips, _Strip(row, rows, key, begin - 1 - key, causal=False))
            _append(strips, _Strip(row, rows, begin - 1, rows, causal=True))
    return strips


def _append(strips: list[_Strip], tile: _Strip) -> None:
    """Add a tile to the strip that it continues, else as a strip of its own."""
    for strip in strips[-2:]:
        follows = strip.row + strip.count * strip.rows == tile.row
        step = tile.key - strip.key if strip.count == 1 else strip.step
        same = (strip.rows, strip.keys, strip.causal) == (tile.rows, tile.keys, tile.causal)
        if same and follows and step > 0 and tile.key == strip.key + step * strip.count:
            strip.step, strip.count = step, strip.count + 1
            return
    strips.append(tile)
