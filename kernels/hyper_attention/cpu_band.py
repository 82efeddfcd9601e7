"""The band on a CPU: each tile of queries with a common first key reads older keys in full and its own causally.

Tiles that follow each other at equal steps are a strip, one call on strided views for a few of them at a time: nothing
is copied, even where tiles overlap, and what a call returns stays in the cache.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, N tiles, R rows, C keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.hyper_attention.cpu_flash import merge_, part_backward, part_forward
from kernels.hyper_attention.plan import Band

_HIDDEN = -1e30
_CACHED_ROWS = 8192


@dataclass
class _Strip:
    """`count` tiles of `rows` queries from `row` on against `keys` keys from `key` on, the next `step` keys later."""

    batch: int
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

    def query_tiles(self, x: Tensor, group: slice) -> Tensor:
        """View [N, Hk, R, ...] of x [B, Hq, T, ...] for the heads of `group`."""
        piece = x[self.batch, group, self.row : self.row + self.rows * self.count]
        return piece.view(len(piece), self.count, self.rows, *x.shape[3:]).transpose(0, 1)

    def key_tiles(self, x: Tensor) -> Tensor:
        """View [N, Hk, C, D] of x [B, Hk, S, D]; tiles may overlap."""
        piece = x[self.batch, :, self.key : self.key + self.step * (self.count - 1) + self.keys]
        return piece.unfold(1, self.keys, max(self.step, 1)).permute(1, 0, 3, 2)

    def bias(self, log_weight: Tensor | None, hidden: Tensor | None, group: slice) -> Tensor | None:
        """View [N, 1, 1, C] of log_weight [B, S]; with hidden [B, Hq, T, M] the sum [N, Hk, R, C] of both."""
        if log_weight is None:
            return None
        bias = self.key_tiles(log_weight[:, None, :, None]).transpose(2, 3)
        if hidden is None:
            return bias
        first = self.key + self.step * torch.arange(self.count)
        column = self.query_tiles(hidden, group).long() - first[:, None, None, None]
        column = torch.where((column >= 0) & (column < self.keys), column, self.keys)
        # A row may have all its keys hidden: its log-sum-exp must stay finite for the merge, which gives it no weight.
        mask = bias.new_zeros(*column.shape[:3], self.keys + 1).scatter_(3, column, _HIDDEN)
        return mask[..., : self.keys] + bias


def band_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scale: float,
    out: Tensor,
    lse: Tensor,
    log_weight: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Merge the band into `out` [B, Hq, T, D] and `lse` [B, Hq, T], in place.

    `log_weight` [B, S] belongs to the keys; `hidden` int [B, Hq, T, M] are keys that a query does not read.
    """
    for strip in _pieces(band):
        key, value = strip.key_tiles(k), strip.key_tiles(v)
        for group in _groups(q, k):
            bias = strip.bias(log_weight, hidden, group)
            part = part_forward(strip.query_tiles(q, group), key, value, scale, strip.causal, bias)
            merge_(strip.query_tiles(out, group), strip.query_tiles(lse, group), *part)


def band_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    log_weight: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Add the band's share to `grads`, (dq, dk, dv), in place; `out` and `lse` are those of the whole softmax."""
    for strip in _pieces(band):
        key, value = strip.key_tiles(k), strip.key_tiles(v)
        for group in _groups(q, k):
            bias = strip.bias(log_weight, hidden, group)
            rows = [strip.query_tiles(x, group) for x in (grad_out, q, out, lse)]
            parts = part_backward(rows[0], rows[1], key, value, rows[2], rows[3], scale, strip.causal, bias)
            strip.query_tiles(grads[0], group).add_(parts[0])
            for grad, part in zip(grads[1:], parts[1:], strict=True):
                _add_tiles(strip, grad, part)


def _add_tiles(strip: _Strip, grad: Tensor, part: Tensor) -> None:
    """Add [N, Hk, C, D] to the keys of each tile; tiles may overlap, so those that do are added in turn."""
    turns = 1 if strip.step >= strip.keys else -(-strip.keys // max(strip.step, 1))
    for turn in range(min(turns, strip.count)):
        tiles = strip.key_tiles(grad)[turn::turns]
        tiles.add_(part[turn::turns])


def _groups(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Query heads that read key heads 0, 1, ..., one of each group at a time."""
    groups = q.shape[1] // k.shape[1]
    for member in range(groups):
        yield slice(member, None, groups)


def _pieces(band: Band) -> Iterator[_Strip]:
    return (piece for strip in _strips(band) for piece in strip.pieces())


def _strips(band: Band) -> list[_Strip]:
    """The band as tiles: queries with a common first key, whose last is common too or their own.

    Those with keys of their own read what is older than the first of these in full, then their own causally.
    """
    strips: list[_Strip] = []
    for batch in range(band.start.shape[0]):
        start, stop = band.start[batch], band.stop[batch]
        grows = stop.diff()
        cut = (start.diff() != 0) | (grows > 1)
        cut[1:] |= (grows[1:] != grows[:-1]) & ~cut[:-1]
        edges = [0, *(cut.nonzero().flatten() + 1).tolist(), len(start)]
        for row, end in pairwise(edges):
            key, rows = int(start[row]), end - row
            last = int(band.stop[batch, row + rows - 1])
            begin = int(band.stop[batch, row])
            if last == begin > key:
                _append(strips, _Strip(batch, row, rows, key, last - key, causal=False))
            elif last > begin:
                if begin - 1 > key:
                    _append(strips, _Strip(batch, row, rows, key, begin - 1 - key, causal=False))
                _append(strips, _Strip(batch, row, rows, begin - 1, rows, causal=True))
    return strips


def _append(strips: list[_Strip], tile: _Strip) -> None:
    """Add a tile to the strip that it continues, else as a strip of its own."""
    for strip in strips[-2:]:
        shape = (strip.batch, strip.rows, strip.keys, strip.causal)
        follows = strip.row + strip.count * strip.rows == tile.row
        step = tile.key - strip.key if strip.count == 1 else strip.step
        same = shape == (tile.batch, tile.rows, tile.keys, tile.causal)
        if same and follows and step > 0 and tile.key == strip.key + step * strip.count:
            strip.step, strip.count = step, strip.count + 1
            return
    strips.append(tile)
