"""One level of the recursion on a CPU: sorted blocks and samples, gathered in tiles that stay in the cache.

A tile is one run of query slots that share a block, for all query heads of the key head. Its keys are the block and the
draws, in one softmax. A bias holds the weights of the draws, and hides the places that a short block leaves empty.

Shape letters: G query heads, T queries, S keys, D head size, N tiles of the level, R rows of a tile, C keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.cpu.flash import merge_, part_backward, part_forward
from kernels.hyper_attention.cpu.heads import Gradients, Head
from kernels.hyper_attention.plan.tables import Level, block_start

_CACHED_ROWS = 8192


@dataclass(frozen=True)
class _Tiles:
    """Rows to gather: `rows` [N, G * R] into [G * T], `keys` [N, C] into [S]; `bias` [N, 1, 1, C].

    `valid` [N, G * R] is false on rows that only fill a tile, or None if there are none.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor
    valid: Tensor | None


def level_forward(head: Head, level: Level) -> None:
    """Merge the level into `head.out` and `head.lse`, in place."""
    q, out, lse = head.q.flatten(0, 1), head.out.flatten(0, 1), head.lse.flatten()
    for tiles in _chunks(_tiles(level, head)):
        key, value = _take(head.k, tiles.keys), _take(head.v, tiles.keys)
        parts = part_forward(_take(q, tiles.rows), key, value, head.scale, False, tiles.bias)
        index, part_out, part_lse = _rows(tiles, *(x.squeeze(1) for x in parts))
        old_out, old_lse = out.index_select(0, index), lse.index_select(0, index)
        merge_(old_out, old_lse, part_out, part_lse)
        out.index_copy_(0, index, old_out)
        lse.index_copy_(0, index, old_lse)


def level_backward(head: Head, grads: Gradients, level: Level) -> None:
    """Add the level's share to `grads`, in place."""
    q, out, lse, grad_out, grad_q = (x.flatten(0, 1) for x in (head.q, head.out, head.lse, grads.out, grads.q))
    for tiles in _chunks(_tiles(level, head)):
        grad_rows = _take(grad_out, tiles.rows)
        if tiles.valid is not None:
            grad_rows = grad_rows * tiles.valid[:, None, :, None]
        key, value = _take(head.k, tiles.keys), _take(head.v, tiles.keys)
        rows = (_take(out, tiles.rows), lse[tiles.rows][:, None])
        part_q, part_k, part_v = part_backward(
            grad_rows, _take(q, tiles.rows), key, value, *rows, head.scale, False, tiles.bias
        )
        index, part_q = _rows(tiles, part_q.squeeze(1))
        grad_q.index_add_(0, index, part_q)
        grads.k.index_add_(0, tiles.keys.flatten(), part_k.flatten(0, 2))
        grads.v.index_add_(0, tiles.keys.flatten(), part_v.flatten(0, 2))


def _tiles(level: Level, head: Head) -> _Tiles:
    """All tiles of the level."""
    (G, T), S, size = head.lse.shape, len(head.k), level.block_size
    segment, run = _runs(level.segments[head.row], size)
    bounds = tuple(x[:, None] for x in level.segments[head.row, segment].long().unbind(-1))
    key_start, key_stop, query_start, query_stop = bounds
    first = query_start + run[:, None] * size
    slot = first + torch.arange(min(size, T))
    valid = slot < query_stop
    rows = head.of_queries(level.query_order)[:, torch.minimum(slot, query_stop - 1)]
    rows = rows + (torch.arange(G) * T)[:, None, None]
    start, block_keys = block_start(bounds, first, size), (key_stop - key_start).clamp(max=size)
    column = torch.arange(int(block_keys.max()) if len(block_keys) else 0)
    draw = key_start + head.of_key(level.sample_rank)[segment]
    draw = draw + torch.where(draw < start, 0, block_keys)
    keys = head.of_key(level.key_order)[torch.cat([start + column, draw], -1).clamp(max=S - 1)].long()
    bias = torch.where(column < block_keys, 0.0, -torch.inf)
    bias = torch.cat([bias, level.sample_log_weight[head.row, segment]], -1)
    full = bool(valid.all())
    return _Tiles(rows.transpose(0, 1).flatten(1), keys, bias[:, None, None], None if full else valid.repeat(1, G))


def _runs(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of each run of `size` query slots: its segment, and its number in that segment; int64 [N] both."""
    runs = (segments[:, 3] - segments[:, 2] + size - 1).div(size, rounding_mode="floor").long()
    segment = torch.repeat_interleave(torch.arange(len(runs)), runs)
    return segment, torch.arange(len(segment)) - (runs.cumsum(0) - runs)[segment]


def _chunks(tiles: _Tiles) -> Iterator[_Tiles]:
    count = max(1, _CACHED_ROWS // tiles.keys.shape[1])
    for first in range(0, len(tiles.rows), count):
        piece = slice(first, first + count)
        valid = None if tiles.valid is None else tiles.valid[piece]
        yield _Tiles(tiles.rows[piece], tiles.keys[piece], tiles.bias[piece], valid)


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Rows of `flat` [rows, D] as [N, 1, ..., D]."""
    return flat.index_select(0, index.flatten()).view(len(index), 1, -1, flat.shape[1])


def _rows(tiles: _Tiles, *parts: Tensor) -> tuple[Tensor, ...]:
    """The index of the valid rows, and the `parts` of those rows, each [rows, ...]."""
    flat = [tiles.rows.flatten(), *(x.flatten(0, 1) for x in parts)]
    return tuple(flat if tiles.valid is None else (x[tiles.valid.flatten()] for x in flat))
