"""The look-back by nomination on a CPU: each tile of queries against the segments of its list, as one dense block.

The keys of a tile are padded to a multiple of 512, the keys that torch's flash attention takes at a time: entries that
only later rows read then add whole blocks of weight 0, and change no bit of earlier rows.

Shape letters: G query heads, T queries, S keys, D head size, P segments, N tiles, R rows of a tile, C keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.cpu.flash import merge_, part_backward, part_forward
from kernels.hyper_attention.cpu.heads import Gradients, Head
from kernels.hyper_attention.plan.tables import KeyPlan

_HIDDEN = -1e30
_BLOCK = 512
_CACHED_ROWS = 16384


@dataclass(frozen=True)
class _Tiles:
    """Some tiles of one query head: `rows` [N, R] into [T], `keys` [N, C] into [S], `bias` [N, 1, R, C], `valid` [N, R]
    false on rows that only fill a tile.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor
    valid: Tensor


def lists_forward(head: Head, plan: KeyPlan) -> None:
    """Merge the listed segments into `head.out` and `head.lse`, in place."""
    for member in range(len(head.q)):
        q, out, lse = head.q[member], head.out[member], head.lse[member]
        for tiles in _tiles(plan, head, member):
            parts = part_forward(
                _take(q, tiles.rows),
                _take(head.k, tiles.keys),
                _take(head.v, tiles.keys),
                head.scale,
                False,
                tiles.bias,
            )
            merged_out, merged_lse = _take(out, tiles.rows), lse[tiles.rows][:, None]
            merge_(merged_out, merged_lse, *parts)
            index = tiles.rows[tiles.valid]
            out.index_copy_(0, index, merged_out.squeeze(1)[tiles.valid])
            lse.index_copy_(0, index, merged_lse.squeeze(1)[tiles.valid])


def lists_backward(head: Head, grads: Gradients, plan: KeyPlan) -> None:
    """Add the listed segments' share to `grads`, in place."""
    for member in range(len(head.q)):
        q, out, lse, grad_out, grad_q = (x[member] for x in (head.q, head.out, head.lse, grads.out, grads.q))
        for tiles in _tiles(plan, head, member):
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


def _tiles(plan: KeyPlan, head: Head, member: int) -> Iterator[_Tiles]:
    """The tiles with a list; tiles with equally many keys together, a few at a time, so that they stay in the cache."""
    lists, pooled = plan.lists, plan.pooled
    assert lists is not None and pooled is not None  # noqa: S101, PT018 - for the type checker
    tiles, row_of_batch, L, P = lists.tiles, head.row, pooled.length, pooled.start.shape[1]
    T, S = len(head.q[member]), len(head.k)
    segment, first = (head.of_queries(x)[member] for x in (lists.segment, lists.first))
    begin = pooled.start[row_of_batch].long()
    usable = pooled.skip[row_of_batch]
    keys_of = (segment < P).sum(-1) * L
    width = -(-keys_of // _BLOCK) * _BLOCK
    within = torch.arange(L)
    for C in sorted(set(width[width > 0].tolist())):
        count = -(-C // L)
        for tile in (width == C).nonzero().flatten().split(max(1, _CACHED_ROWS // C)):
            row = torch.arange(tiles.size)
            position = tiles.row[row_of_batch, tile, None] + row - (S - T)
            valid = (position >= 0) & (position < tiles.stop[row_of_batch, tile, None] - (S - T))
            entry = torch.nn.functional.pad(segment[tile], (0, max(0, count - segment.shape[1])), value=P)[:, :count]
            start = torch.nn.functional.pad(first[tile], (0, max(0, count - first.shape[1])), value=tiles.size)
            exists = entry < P
            name = torch.where(exists, entry, 0).long()
            keys = torch.where(exists, begin[name], 0)[..., None] + within
            seen_key = exists[..., None] & (within >= usable[name][..., None])
            # Rows before the entry's first row do not read its keys.
            from_row = torch.where(seen_key, start[:, :count, None], tiles.size).flatten(1)[:, :C]
            bias = torch.where(row[:, None] >= from_row[:, None], 0.0, _HIDDEN)[:, None]
            yield _Tiles(torch.where(valid, position, 0), keys.flatten(1)[:, :C], bias, valid)


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Rows of `flat` [rows, D] as [N, 1, ..., D]."""
    return flat.index_select(0, index.flatten()).view(len(index), 1, -1, flat.shape[1])
