"""What the Triton kernels are given: tensors with their strides, as tuples, and how a tile of one is read.

Shape letters: B batch, H heads, N rows (queries, keys or slots), D head size, BD columns of a tile, C rows of a tile
that is streamed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(2147483647)


class Rows(NamedTuple):
    """A tensor [B, H, N, D] of any strides."""

    pointer: Any
    stride_b: int
    stride_h: int
    stride_n: int
    stride_d: int


class Table(NamedTuple):
    """A tensor [B, H, N] with unit stride along N; a stride is 0 where batches or heads share it."""

    pointer: Any
    stride_b: int
    stride_h: int


class Ranges(NamedTuple):
    """For each of one side's rows, the range [start, stop) of the other side's rows; monotone."""

    start: Table
    stop: Table


class Hidden(NamedTuple):
    """Keys within its range that a query does not read: a tensor [B, Hq, T, M] and M."""

    key: Rows
    count: Any


class Keys(NamedTuple):
    """Keys that the queries read by ranges: of positions, or of slots of `order` if there is one."""

    key: Rows
    value: Rows
    order: Table | None
    ranges: Ranges
    log_weight: Table | None
    hidden: Hidden | None = None


def rows(x_BHND: Tensor) -> Rows:
    """The tensor as a kernel takes it."""
    return Rows(x_BHND, *x_BHND.stride())


def table(x: Tensor) -> Table:
    """[B, N] or [B, H, N] as a kernel takes it; heads share [B, N]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Table(x, x.stride(0), x.stride(1) if x.ndim == 3 else 0)


def ranges(start: Tensor, stop: Tensor) -> Ranges:
    """Two tables as a kernel takes them."""
    return Ranges(table(start), table(stop))


@triton.jit
def entries(table, batch, head):
    """Pointer to the table of one head; batch and head are int64."""
    return table.pointer + batch * table.stride_b + head * table.stride_h


@triton.jit
def load_rows(x, batch, head, position, inside, D: tl.constexpr, BD: tl.constexpr):
    """Rows [N, BD] at `position` [N]; 0 outside `inside` [N] (None: all are inside) and in columns from D on."""
    column = tl.arange(0, BD)
    first = x.pointer + batch * x.stride_b + head * x.stride_h
    pointer = first + position.to(tl.int64)[:, None] * x.stride_n + column[None, :] * x.stride_d
    if inside is None:
        tile = tl.load(pointer) if D == BD else tl.load(pointer, mask=column[None, :] < D, other=0.0)
    elif D == BD:
        tile = tl.load(pointer, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointer, mask=inside[:, None] & (column[None, :] < D), other=0.0)
    return tile


@triton.jit
def store_rows(x, batch, head, position, inside, tile, D: tl.constexpr, BD: tl.constexpr):
    """Write `tile` [N, BD] to the rows `position` [N] that are `inside`, in the tensor's dtype."""
    column = tl.arange(0, BD)
    first = x.pointer + batch * x.stride_b + head * x.stride_h
    pointer = first + position.to(tl.int64)[:, None] * x.stride_n + column[None, :] * x.stride_d
    mask = inside[:, None]
    if D != BD:
        mask = mask & (column[None, :] < D)
    tl.store(pointer, tile.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def positions(order, batch, head, slot, inside):
    """Position of each slot, [N]; the slot itself without an order."""
    result = slot
    if order is not None:
        if inside is None:
            result = tl.load(entries(order, batch, head) + slot)
        else:
            result = tl.load(entries(order, batch, head) + slot, mask=inside, other=0)
    return result


@triton.jit
def reads(hidden, batch, head, query, within, key):
    """Whether query [N] reads key [C], bool [N, C]; queries out of `within` [N] (None: all are) may be any."""
    result = (query[:, None] >= 0) & (key[None, :] >= 0)
    pointer = hidden.key.pointer + batch * hidden.key.stride_b + head * hidden.key.stride_h
    pointer += query.to(tl.int64) * hidden.key.stride_n
    # Unrolled: only a loop without loops in it loads ahead.
    for i in tl.static_range(hidden.count):
        if within is None:
            left_out = tl.load(pointer + i * hidden.key.stride_d)
        else:
            left_out = tl.load(pointer + i * hidden.key.stride_d, mask=within, other=0)
        result = result & (left_out[:, None] != key[None, :])
    return result


@triton.jit
def spans(start, stop, C: tl.constexpr, LOOSE: tl.constexpr):
    """What a tile of rows must stream, given the range [start, stop) of each row.

    Returns (low, full, count, resume, high): [low, high) holds all ranges; from `full` on, `count` tiles of C belong to
    every row and need no mask; [low, full) and [resume, high) belong to some. If LOOSE, rows of empty ranges do not
    count, and the caller masks them; else one of them leaves no tile without a mask. Tiles begin at multiples of C, so
    that how a row's sum is cut, and rounds, depends on its own range alone.
    """
    some = start < stop
    low = tl.min(tl.where(some, start, _FAR))
    high = tl.max(tl.where(some, stop, 0))
    low = tl.minimum(low, high) // C * C
    if LOOSE:
        start = tl.where(some, start, low)
        stop = tl.where(some, stop, high)
    full = tl.cdiv(tl.max(start), C) * C
    count = tl.maximum(tl.min(stop) - full, 0) // C
    full = tl.where(count > 0, full, high)
    return low, full, count, full + count * C, high


@triton.jit
def edge(i, low, full, resume, high, C: tl.constexpr):
    """First row and limit of the i-th tile of [low, full) and [resume, high)."""
    left = tl.cdiv(full - low, C)
    first = tl.where(i < left, low + i * C, resume + (i - left) * C)
    return first, tl.where(i < left, full, high)


@triton.jit
def edges(low, full, resume, high, C: tl.constexpr):
    """How many tiles `edge` has."""
    return tl.cdiv(full - low, C) + tl.cdiv(high - resume, C)
