"""How the kernels of mode "causal_local" find their rows: tiles of documents by arithmetic, and rows of a tensor.

Shape letters: B batch, H heads, T queries, S keys, D head size, BD columns of a tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointer, stride, position, inside, MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows [N, BD] at `position` [N] of the head at `pointer`; 0 outside `inside` [N] and in columns from D on."""
    column = tl.arange(0, BD)
    at = pointer + position.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        if D == BD:
            tile = tl.load(at, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=inside[:, None] & (column[None, :] < D), other=0.0)
    else:
        if D == BD:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=column[None, :] < D, other=0.0)
    return tile


@triton.jit
def store_rows(pointer, position, inside, tile, D: tl.constexpr, BD: tl.constexpr):
    """Write `tile` [N, BD] to the rows `position` [N] that are `inside` of the contiguous head at `pointer`."""
    column = tl.arange(0, BD)
    at = pointer + position.to(tl.int64)[:, None] * D + column[None, :]
    mask = inside[:, None]
    if D != BD:
        mask = mask & (column[None, :] < D)
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED: tl.constexpr, TILE: tl.constexpr):
    """(first row, one past the last, start of the document, its end) of a slot's tile.

    The same tiles as `plan.tiles.cut_tiles`. An empty slot has no rows. `slot` may be a number or a vector.
    """
    if PACKED:
        edge = (first_block + slot // 2) * TILE
        position = tl.minimum(edge + (slot % 2) * (TILE - 1), S - 1)
        start = tl.load(starts + position)
        end = tl.load(stops + position)
        row = start + (tl.maximum(edge - start, 0) + TILE - 1) // TILE * TILE
        there = (end - start > exact_limit) & (row < end) & ((slot % 2 == 0) | (start > edge))
        stop = tl.where(there, tl.minimum(end, row + TILE), row)
    else:
        row = (first_block + slot) * TILE
        stop = tl.minimum(row + TILE, S)
        start = slot * 0
        end = start + S
    return row, stop, start, end


@triton.jit
def documents_kernel(ids, starts, stops, ordered, S, BS: tl.constexpr):
    """Start and end of the document of each token of a row of the batch, int32 [B, S], as `documents.of_ids`.

    Also whether its ids do not decrease, save for padding, bool [B].
    """
    batch = tl.program_id(0).to(tl.int64)
    ids += batch * S
    starts += batch * S
    stops += batch * S
    begin = S * 0
    largest = S * 0 - 1
    fine = S * 0 + 1
    for first in range(0, S, BS):
        position = first + tl.arange(0, BS)
        within = position < S
        name = tl.load(ids + position, mask=within, other=-1).to(tl.int32)
        before = tl.load(ids + position - 1, mask=within & (position > 0), other=-2).to(tl.int32)
        fresh = (name != before) | (position == 0)
        start = tl.maximum(tl.associative_scan(tl.where(fresh, position, 0), 0, _larger), begin)
        tl.store(starts + position, tl.where(name == -1, position, start), mask=within)
        peak = tl.maximum(tl.associative_scan(before, 0, _larger), largest)
        falls = within & (name != -1) & (name < peak)
        fine = tl.where(tl.max(falls.to(tl.int32), 0) > 0, 0, fine)
        begin = tl.maximum(tl.max(tl.where(fresh & within, position, 0), 0), begin)
        largest = tl.maximum(tl.max(tl.where(within, name, -1), 0), largest)
    tl.store(ordered + batch, fine != 0)
    end = S * 1
    for back in range(0, S, BS):
        position = (S - 1) // BS * BS - back + tl.arange(0, BS)
        within = position < S
        name = tl.load(ids + position, mask=within, other=-1).to(tl.int32)
        after = tl.load(ids + position + 1, mask=position + 1 < S, other=-2).to(tl.int32)
        last = (name != after) | (position + 1 >= S)
        stop = tl.associative_scan(tl.where(last & within, position + 1, 2147483647), 0, _smaller, reverse=True)
        stop = tl.minimum(stop, end)
        tl.store(stops + position, tl.where(name == -1, position, stop), mask=within)
        end = tl.minimum(tl.min(tl.where(last & within, position + 1, 2147483647), 0), end)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)
