"""The look-back on a CPU: tiles of queries that follow each other in one bucket, against the span of keys they share.

A tile's rows read nearly the same keys, shifted by the few that the window left behind between them; a bias hides what
is not theirs.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, N tiles, R rows, C keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.cpu_flash import merge_, part_backward, part_forward
from kernels.hyper_attention.plan import Lookback

_ROWS, _CUT = 64, 64
_CACHED_ROWS = 16384


@dataclass(frozen=True)
class _Tiles:
    """Rows to gather: `rows` [N, R] into [B * Hq * T], `keys` [N, C] into [B * Hk * S], `bias` [N, 1, R, C].

    There is no bias where all rows of a bucket read the same keys. `valid` [N, R] is false on rows that only fill a
    tile; they read the tile's first key, or the same keys.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor | None
    valid: Tensor


def lookback_forward(
    q: Tensor, k: Tensor, v: Tensor, lookback: Lookback, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Merge the look-back into `out` [B, Hq, T, D] and `lse` [B, Hq, T], in place; all contiguous, q, k and v too."""
    flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 2) for x in (q, k, v, out))
    flat_lse = lse.flatten()
    for tiles in _tiles(lookback):
        key, value = _take(flat_k, tiles.keys), _take(flat_v, tiles.keys)
        parts = part_forward(_take(flat_q, tiles.rows), key, value, scale, False, tiles.bias)
        # Whole tiles, filling rows too: how many rows there are would decide which of them torch rounds as a vector.
        merged_out, merged_lse = _take(flat_out, tiles.rows), flat_lse[tiles.rows][:, None]
        merge_(merged_out, merged_lse, *parts)
        index = tiles.rows[tiles.valid]
        flat_out.index_copy_(0, index, merged_out.squeeze(1)[tiles.valid])
        flat_lse.index_copy_(0, index, merged_lse.squeeze(1)[tiles.valid])


def lookback_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lookback: Lookback,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the look-back's share to `grads`, (dq, dk, dv), in place; `out` and `lse` are those of the whole softmax."""
    flat_q, flat_k, flat_v, flat_out, flat_grad = (x.flatten(0, 2) for x in (q, k, v, out, grad_out))
    flat_lse = lse.flatten()
    grad_q, grad_k, grad_v = (x.flatten(0, 2) for x in grads)
    for tiles in _tiles(lookback):
        # A filling row has no weight: exp(logit - inf).
        row_lse = torch.where(tiles.valid, flat_lse[tiles.rows], torch.inf)[:, None]
        q_rows, out_rows, grad_rows = (_take(x, tiles.rows) for x in (flat_q, flat_out, flat_grad))
        key, value = _take(flat_k, tiles.keys), _take(flat_v, tiles.keys)
        part_q, part_k, part_v = part_backward(
            grad_rows, q_rows, key, value, out_rows, row_lse, scale, False, tiles.bias
        )
        grad_q.index_add_(0, tiles.rows[tiles.valid], part_q.squeeze(1)[tiles.valid])
        grad_k.index_add_(0, tiles.keys.flatten(), part_k.flatten(0, 2))
        grad_v.index_add_(0, tiles.keys.flatten(), part_v.flatten(0, 2))


def _tiles(lookback: Lookback) -> Iterator[_Tiles]:
    """Tiles of all heads, a few at a time so that they stay in the cache.

    Where a tile is cut, and how many keys it has, follows from its first row and rows before: else later tokens would
    change the rounding of earlier rows.
    """
    (Hq, T), (Hk, S) = lookback.band.start.shape[1:], lookback.key_order.shape[1:]
    start, stop = lookback.band.start.flatten().long(), lookback.band.stop.flatten().long()
    slot = (stop > start).nonzero().flatten()
    head, start, stop = slot // T, start[slot], stop[slot]
    rows = lookback.query_order.flatten()[slot] + head * T
    first, count = _cuts(head, start, stop)
    low, place = start[first], (head[first] // (Hq // Hk)) * S
    width = stop[first] - low
    if lookback.moves:
        width = (width + 2 * _CUT - 1) // _CUT * _CUT
    key_order = lookback.key_order.flatten()
    for C in sorted(set(width.tolist())):
        for tile in (width == C).nonzero().flatten().split(max(1, _CACHED_ROWS // C)):
            row, column = torch.arange(_ROWS), low[tile, None] + torch.arange(C)
            valid = row < count[tile, None]
            member = first[tile, None] + torch.where(valid, row, 0)
            if not lookback.moves:
                yield _Tiles(rows[member], key_order[column + place[tile, None]] + place[tile, None], None, valid)
                continue
            seen = (column[:, None] >= start[member][..., None]) & (column[:, None] < stop[member][..., None])
            keys = torch.where(seen.any(1), column, low[tile, None]) + place[tile, None]
            bias = torch.where(seen, 0.0, -torch.inf)[:, None]
            yield _Tiles(rows[member], key_order[keys] + place[tile, None], bias, valid)


def _cuts(head: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """First row and number of rows of each tile, for rows with these key ranges.

    A tile has at most _ROWS rows of one bucket, and their last keys differ by less than _CUT.
    """
    index = torch.arange(len(start))
    fresh = torch.ones_like(start, dtype=torch.bool)
    fresh[1:] = (head[1:] != head[:-1]) | (start[1:] >= stop[:-1])
    for size, place in ((_CUT, stop), (_ROWS, index)):
        begin = torch.where(fresh, index, 0).cummax(0).values
        piece = (place - place[begin]) // size
        fresh[1:] |= piece[1:] != piece[:-1]
    first = fresh.nonzero().flatten()
    return first, torch.diff(first, append=torch.tensor([len(start)]))


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Rows of `flat` [rows, D] as [N, 1, ..., D]."""
    return flat.index_select(0, index.flatten()).view(len(index), 1, -1, flat.shape[1])
