"""The look-back on a CPU: tiles of queries that follow each other in one bucket, against the span of keys they share.

A tile's rows read nearly the same keys: the window moves on between two rows, so their ranges differ by a few keys. A
bias hides from each row the keys that are not its own.

Shape letters: G query heads, T queries, S keys, D head size, N tiles, R rows, C keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.cpu.flash import merge_, part_backward, part_forward
from kernels.hyper_attention.cpu.heads import Gradients, Head
from kernels.hyper_attention.plan.tables import Lookback

_ROWS, _CUT = 64, 64
_CACHED_ROWS = 16384


@dataclass(frozen=True)
class _Tiles:
    """Rows to gather: `rows` [N, R] into [G * T], `keys` [N, C] into [S], `bias` [N, 1, R, C].

    There is no bias where all rows of a bucket read the same keys. `valid` [N, R] is false on rows that only fill a
    tile; they read the tile's first key, or the same keys.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor | None
    valid: Tensor


def lookback_forward(head: Head, lookback: Lookback) -> None:
    """Merge the look-back into `head.out` and `head.lse`, in place."""
    q, out, lse = head.q.flatten(0, 1), head.out.flatten(0, 1), head.lse.flatten()
    for tiles in _tiles(lookback, head):
        key, value = _take(head.k, tiles.keys), _take(head.v, tiles.keys)
        parts = part_forward(_take(q, tiles.rows), key, value, head.scale, False, tiles.bias)
        # Filling rows are merged too: which rows torch rounds in vector code depends on the number of rows.
        merged_out, merged_lse = _take(out, tiles.rows), lse[tiles.rows][:, None]
        merge_(merged_out, merged_lse, *parts)
        index = tiles.rows[tiles.valid]
        out.index_copy_(0, index, merged_out.squeeze(1)[tiles.valid])
        lse.index_copy_(0, index, merged_lse.squeeze(1)[tiles.valid])


def lookback_backward(head: Head, grads: Gradients, lookback: Lookback) -> None:
    """Add the look-back's share to `grads`, in place."""
    q, out, lse, grad_out, grad_q = (x.flatten(0, 1) for x in (head.q, head.out, head.lse, grads.out, grads.q))
    for tiles in _tiles(lookback, head):
        # A filling row has no weight: exp(logit - inf).
        row_lse = torch.where(tiles.valid, lse[tiles.rows], torch.inf)[:, None]
        q_rows, out_rows, grad_rows = (_take(x, tiles.rows) for x in (q, out, grad_out))
        key, value = _take(head.k, tiles.keys), _take(head.v, tiles.keys)
        part_q, part_k, part_v = part_backward(
            grad_rows, q_rows, key, value, out_rows, row_lse, head.scale, False, tiles.bias
        )
        grad_q.index_add_(0, tiles.rows[tiles.valid], part_q.squeeze(1)[tiles.valid])
        grads.k.index_add_(0, tiles.keys.flatten(), part_k.flatten(0, 2))
        grads.v.index_add_(0, tiles.keys.flatten(), part_v.flatten(0, 2))


def _tiles(lookback: Lookback, head: Head) -> Iterator[_Tiles]:
    """The tiles, a few at a time so that they stay in the cache.

    Where a tile is cut, and how many keys it has, depends only on its first row and on rows before it; otherwise later
    tokens would change the rounding of earlier rows.
    """
    T, key_order = head.q.shape[1], head.of_key(lookback.key_order).long()
    start, stop = (head.of_queries(x).flatten().long() for x in (lookback.band.start, lookback.band.stop))
    slot = (stop > start).nonzero().flatten()
    member, start, stop = slot // T, start[slot], stop[slot]
    rows = head.of_queries(lookback.query_order).flatten()[slot] + member * T
    first, count = _cuts(member, start, stop)
    low = start[first]
    width = stop[first] - low
    if lookback.moves:
        width = (width + 2 * _CUT - 1) // _CUT * _CUT
    for C in sorted(set(width.tolist())):
        for tile in (width == C).nonzero().flatten().split(max(1, _CACHED_ROWS // C)):
            row, column = torch.arange(_ROWS), low[tile, None] + torch.arange(C)
            valid = row < count[tile, None]
            place = first[tile, None] + torch.where(valid, row, 0)
            if not lookback.moves:
                yield _Tiles(rows[place], key_order[column], None, valid)
                continue
            seen = (column[:, None] >= start[place][..., None]) & (column[:, None] < stop[place][..., None])
            keys = torch.where(seen.any(1), column, low[tile, None])
            bias = torch.where(seen, 0.0, -torch.inf)[:, None]
            yield _Tiles(rows[place], key_order[keys], bias, valid)


def _cuts(member: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """First row and number of rows of each tile, for rows of these query heads with these key ranges.

    A tile has at most _ROWS rows of one bucket, and their last keys differ by less than _CUT.
    """
    index = torch.arange(len(start))
    fresh = torch.ones_like(start, dtype=torch.bool)
    fresh[1:] = (member[1:] != member[:-1]) | (start[1:] >= stop[:-1])
    for size, place in ((_CUT, stop), (_ROWS, index)):
        begin = torch.where(fresh, index, 0).cummax(0).values
        piece = (place - place[begin]) // size
        fresh[1:] |= piece[1:] != piece[:-1]
    first = fresh.nonzero().flatten()
    return first, torch.diff(first, append=torch.tensor([len(start)]))


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Rows of `flat` [rows, D] as [N, 1, ..., D]."""
    return flat.index_select(0, index.flatten()).view(len(index), 1, -1, flat.shape[1])
