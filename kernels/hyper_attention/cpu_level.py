"""One level of the recursion on a CPU: sorted blocks and samples, gathered in tiles that stay in the cache.

A tile is one run of query slots that share a block, for all query heads of a key head. Its keys are the block and the
draws behind it, in one softmax; the weights of the draws, and the keys a short block lacks, are a bias.

Shape letters: B batch, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head size, P segments,
M samples, N tiles of the level, R rows of a tile, C keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.cpu_flash import merge_, part_backward, part_forward
from kernels.hyper_attention.plan import Level

_CACHED_ROWS = 8192


@dataclass(frozen=True)
class _Tiles:
    """Rows to gather; `rows` [N, G * R] into [B * Hq * T], `keys` [N, C] into [B * Hk * S], `bias` [N, 1, 1, C].

    `valid` [N, G * R] is false on rows that only fill a tile, or None if there are none.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor
    valid: Tensor | None


def level_forward(q: Tensor, k: Tensor, v: Tensor, level: Level, scale: float, out: Tensor, lse: Tensor) -> None:
    """Merge the level into `out` [B, Hq, T, D] and `lse` [B, Hq, T], in place; all contiguous, q, k and v too."""
    flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 2) for x in (q, k, v, out))
    flat_lse = lse.flatten()
    for tiles in _chunks(_tiles(level, q.shape[1])):
        parts = part_forward(
            _take(flat_q, tiles.rows), _take(flat_k, tiles.keys), _take(flat_v, tiles.keys), scale, False, tiles.bias
        )
        index, part_out, part_lse = _rows(tiles, *(x.squeeze(1) for x in parts))
        old_out, old_lse = flat_out.index_select(0, index), flat_lse.index_select(0, index)
        merge_(old_out, old_lse, part_out, part_lse)
        flat_out.index_copy_(0, index, old_out)
        flat_lse.index_copy_(0, index, old_lse)


def level_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    level: Level,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the level's share to `grads`, (dq, dk, dv), in place; `out` and `lse` are those of the whole softmax."""
    flat_q, flat_k, flat_v, flat_out, flat_grad = (x.flatten(0, 2) for x in (q, k, v, out, grad_out))
    flat_lse = lse.flatten()
    grad_q, grad_k, grad_v = (x.flatten(0, 2) for x in grads)
    for tiles in _chunks(_tiles(level, q.shape[1])):
        grad_rows = _take(flat_grad, tiles.rows)
        if tiles.valid is not None:
            grad_rows = grad_rows * tiles.valid[:, None, :, None]
        part_q, part_k, part_v = part_backward(
            grad_rows,
            _take(flat_q, tiles.rows),
            _take(flat_k, tiles.keys),
            _take(flat_v, tiles.keys),
            _take(flat_out, tiles.rows),
            flat_lse[tiles.rows][:, None],
            scale,
            False,
            tiles.bias,
        )
        index, part_q = _rows(tiles, part_q.squeeze(1))
        grad_q.index_add_(0, index, part_q)
        grad_k.index_add_(0, tiles.keys.flatten(), part_k.flatten(0, 2))
        grad_v.index_add_(0, tiles.keys.flatten(), part_v.flatten(0, 2))


def _tiles(level: Level, query_heads: int) -> _Tiles:
    """All tiles of the level, those of one key head after the other."""
    (heads, S), T = level.key_order.shape[1:], level.query_order.shape[2]
    segment, run = _runs(level.segments.flatten(0, 1), level.run)
    batch, number = segment // level.segments.shape[1], segment % level.segments.shape[1]
    key_start, _, query_start, query_stop = (x[:, None] for x in level.segments[batch, number].long().unbind(-1))
    first = query_start + run[:, None] * level.run
    slot = first + torch.arange(min(level.run, T))
    valid = slot < query_stop
    place = (batch[:, None] * query_heads + torch.arange(query_heads))[..., None] * T
    rows = level.query_order.flatten()[place + torch.minimum(slot, query_stop - 1)[:, None]] + place
    block_keys = level.block_keys[batch, number][:, None]
    column = torch.arange(int(block_keys.max()) if len(block_keys) else 0)
    block = level.block.start[batch[:, None], first] + column
    draw = level.sample_rank[batch, :, number]
    jump = (first[..., None] < level.sample_split[batch, :, number]) * block_keys[..., None]
    slots = torch.cat([block[:, None].expand(-1, heads, -1), key_start[..., None] + draw + jump], -1).clamp(max=S - 1)
    place = (batch[:, None] * heads + torch.arange(heads))[..., None] * S
    keys = level.key_order.flatten()[place + slots] + place
    bias = torch.where(column < block_keys, 0.0, -torch.inf)
    bias = torch.cat([bias, level.sample_log_weight[batch, number]], -1)
    return _Tiles(
        rows.view(-1, heads, query_heads // heads * rows.shape[2]).transpose(0, 1).flatten(0, 1),
        keys.transpose(0, 1).flatten(0, 1),
        bias[:, None, None].repeat(heads, 1, 1, 1),
        None if bool(valid.all()) else valid.repeat(heads, query_heads // heads),
    )


def _runs(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Segment and number within it of each run of `size` query slots; int64 [N] both."""
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
    """The true rows' index, and what belongs to them, each [rows, ...]."""
    flat = [tiles.rows.flatten(), *(x.flatten(0, 1) for x in parts)]
    return tuple(flat if tiles.valid is None else (x[tiles.valid.flatten()] for x in flat))
