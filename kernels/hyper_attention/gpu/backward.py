"""The backward kernels: dQ by the tile of queries that owns it, dK and dV by the tile of keys; no atomics.

With the output and log-sum-exp of the whole softmax, each key gives P = exp(logits - lse), dV += P^T dO,
dS = P (dO V^T - delta), dQ += dS K, dK += dS^T Q, where delta = dO . O - dLSE.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size; BM, BN, BD: queries, keys, columns
of a tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.forward import query_tile, read_all
from kernels.hyper_attention.gpu.tiles import (
    LOG2E,
    Rows,
    Table,
    edge,
    edges,
    entries,
    load_rows,
    positions,
    reads,
    spans,
    store_rows,
)


class Queries(NamedTuple):
    """What the keys read of the queries; lse and delta are fp32 [B, Hq, T], by position, lse finite."""

    query: Rows
    grad: Rows
    lse: Table
    delta: Table
    order: Table | None


class Extra(NamedTuple):
    """Gradients that other launches made for some of the keys, to be added.

    Attributes:
        row: [B, Hk, count * S], row of `key` and `value` for each key slot, -1: none.
        key, value: Rows [B, Hk, R, D].
        count: how many rows a key may have.
    """

    row: Table
    key: Rows
    value: Rows
    count: Any


@triton.jit
def delta_kernel(
    grad, out, grad_lse, lse, delta, finite_lse, heads, queries, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """Write delta = dO . O - dLSE, and the log-sum-exp with 0 in place of -inf; both fp32 [B, Hq, T]."""
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    position = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = position < queries
    product = load_rows(grad, batch, head, position, live, D, BD).to(tl.float32)
    product *= load_rows(out, batch, head, position, live, D, BD).to(tl.float32)
    value = tl.load(entries(lse, batch, head) + position, mask=live, other=0.0)
    some = value > float("-inf")
    result = tl.sum(product, 1)
    if grad_lse is not None:
        result -= tl.load(entries(grad_lse, batch, head) + position, mask=live & some, other=0.0)
    tl.store(entries(delta, batch, head) + position, result, mask=live)
    tl.store(entries(finite_lse, batch, head) + position, tl.where(some, value, 0.0), mask=live)


@triton.jit
def _query_gradient(state, query, key, value, weight, inside, scale, PRECISION: tl.constexpr):
    """Add a tile of keys to dQ / scale."""
    q, grad, lse, delta = query
    logits = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    if weight is not None:
        logits += weight[None, :]
    share = tl.exp2(logits - lse[:, None])
    if inside is not None:
        share = tl.where(inside, share, 0.0)
    product = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    change = share * (product - delta[:, None])
    return (tl.dot(change.to(key.dtype), key, state[0], input_precision=PRECISION),)


@triton.jit
def query_gradient_kernel(
    queries_, source, target, seen, near, sinks, pooled, draws, scale, heads, groups, queries,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the launch's share to dQ.

    Args:
        queries_: Queries.
        source: Rows of what earlier launches left, fp32; None: this is the first.
        target: Rows of dQ; rows without keys in this launch are written only if ALL.
        seen: Ranges [B, T] by position: a row has something in `source` if its range is not empty.
        near, sinks, pooled, draws, scale, heads, groups, queries: as in `forward_kernel`.
    """
    batch, head, group, slot, position, live = query_tile(near, queries_.order, heads, groups, queries, BM, ALL)
    query = (
        load_rows(queries_.query, batch, head, position, live, D, BD),
        load_rows(queries_.grad, batch, head, position, live, D, BD),
        tl.load(entries(queries_.lse, batch, head) + position) * LOG2E,
        tl.load(entries(queries_.delta, batch, head) + position),
    )
    state = (tl.zeros([BM, BD], tl.float32),)
    state = read_all(
        state, query, near, sinks, pooled, draws, batch, head, group, slot, scale, D, BD, BN, PRECISION, _query_gradient
    )
    gradient = state[0] * (scale / LOG2E)
    if source is not None:
        start = tl.load(entries(seen.start, batch, head) + position)
        found = live & (start < tl.load(entries(seen.stop, batch, head) + position))
        gradient += load_rows(source, batch, head, position, found, D, BD)
    store_rows(target, batch, head, position, live, gradient, D, BD)


@triton.jit
def _key_gradient(state, key, value, queries, batch, head, slot, within, inside, add, scale, D: tl.constexpr,
                  BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add a tile of query slots to (dK / scale, dV)."""
    position = positions(queries.order, batch, head, slot, within)
    query = load_rows(queries.query, batch, head, position, within, D, BD)
    grad = load_rows(queries.grad, batch, head, position, within, D, BD)
    if within is None:
        lse = tl.load(entries(queries.lse, batch, head) + position)
        delta = tl.load(entries(queries.delta, batch, head) + position)
    else:
        lse = tl.load(entries(queries.lse, batch, head) + position, mask=within, other=0.0)
        delta = tl.load(entries(queries.delta, batch, head) + position, mask=within, other=0.0)
    logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
    if add is not None:
        logits += add[:, None]
    share = tl.exp2(logits - (lse * LOG2E)[None, :])
    if inside is not None:
        share = tl.where(inside, share, 0.0)
    grad_value = tl.dot(share.to(grad.dtype), grad, state[1], input_precision=PRECISION)
    product = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    change = share * (product - delta[None, :])
    return tl.dot(change.to(query.dtype), query, state[0], input_precision=PRECISION), grad_value


@triton.jit
def _piece(start, stop, BM: tl.constexpr):
    """Cut the ranges to this program's share of the queries that the tile of keys reads."""
    low, _, _, _, high = spans(start, stop, BM, LOOSE=True)
    size = tl.cdiv(tl.cdiv(high - low, tl.num_programs(2)), BM) * BM
    first = low + tl.program_id(2) * size
    return tl.maximum(start, first), tl.minimum(stop, first + size)


@triton.jit
def _read_queries(
    state, key, value, queries, ranges, weight, hidden, slot, batch, group, groups, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries that read each key, of all heads of its group. With a weight, few of the keys may be read."""
    for member in range(groups):
        head = group * groups + member
        start = tl.load(entries(ranges.start, batch, head) + slot)
        stop = tl.load(entries(ranges.stop, batch, head) + slot)
        add = None
        if weight is not None:
            start, stop = _piece(start, stop, BM)
            add = tl.where(start < stop, weight, float("-inf"))
        low, full, count, resume, high = spans(start, stop, BM, LOOSE=weight is not None)
        for i in range(count):
            row = full + i * BM + tl.arange(0, BM)
            inside = None
            if hidden is not None:
                inside = tl.trans(reads(hidden, batch, head, row, None, slot))
            state = _key_gradient(
                state, key, value, queries, batch, head, row, None, inside, add, scale, D, BD, PRECISION
            )
        for i in range(edges(low, full, resume, high, BM)):
            first, limit = edge(i, low, full, resume, high, BM)
            row = first + tl.arange(0, BM)
            within = row < limit
            inside = within[None, :] & (row[None, :] >= start[:, None]) & (row[None, :] < stop[:, None])
            if hidden is not None:
                inside = inside & tl.trans(reads(hidden, batch, head, row, within, slot))
            state = _key_gradient(
                state, key, value, queries, batch, head, row, within, inside, add, scale, D, BD, PRECISION
            )
    return state


@triton.jit
def _touched(ranges, extra, slot, batch, group, groups, count):
    """Whether a key has a reader or an extra gradient."""
    result = slot < 0
    for head in range(group * groups, (group + 1) * groups):
        start = tl.load(entries(ranges.start, batch, head) + slot)
        result = result | (start < tl.load(entries(ranges.stop, batch, head) + slot))
    if extra is not None:
        for i in range(extra.count):
            result = result | (tl.load(entries(extra.row, batch, group) + i * count + slot) >= 0)
    return result


@triton.jit
def key_gradient_kernel(
    queries, keys, sinks, source, target, seen, extra, scale, heads, groups, count,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the launch's share to dK and dV.

    Args:
        queries: Queries.
        keys: Keys, whose ranges are those of the queries that read each key, [B, Hq, S].
        sinks: Ranges, of more queries that read the same keys, or None.
        source: (Rows of dK, Rows of dV) of what earlier launches left, fp32; None: this is the first.
        target: (Rows of dK, Rows of dV); keys without queries in this launch are written only if ALL. Keys with a
            weight are written to their slots: of draws, one key may have several. With several programs along the third
            axis, batch b of program i is written to batch i * B + b, to be summed.
        seen: Ranges [B, S] by position: a key has something in `source` if its range is not empty; None: all have.
        extra: Extra, or None.
        scale: of the logits, in base 2.
        heads, groups, count: Hk, Hq / Hk, S.
    """
    batch, group = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    index = tl.program_id(0) // heads * BN + tl.arange(0, BN)
    slot = tl.minimum(index, count - 1)
    live = index < count
    if not ALL:
        live = live & _touched(keys.ranges, extra, slot, batch, group, groups, count)
    position = positions(keys.order, batch, group, slot, None)
    key = load_rows(keys.key, batch, group, position, live, D, BD)
    value = load_rows(keys.value, batch, group, position, live, D, BD)
    state = (tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32))
    weight = None
    if keys.log_weight is not None:
        weight = tl.load(entries(keys.log_weight, batch, group) + slot) * LOG2E
    state = _read_queries(
        state, key, value, queries, keys.ranges, weight, keys.hidden, slot, batch, group, groups, scale,
        D, BD, BM, PRECISION,
    )  # fmt: skip
    if sinks is not None:
        exact = tl.zeros([BN], tl.float32)
        state = _read_queries(
            state, key, value, queries, sinks, exact, None, slot, batch, group, groups, scale, D, BD, BM, PRECISION
        )
    grad_key, grad_value = state[0] * (scale / LOG2E), state[1]
    if source is not None:
        found = live
        if seen is not None:
            begin = tl.load(entries(seen.start, batch, group) + position)
            found = live & (begin < tl.load(entries(seen.stop, batch, group) + position))
        grad_key += load_rows(source[0], batch, group, position, found, D, BD)
        grad_value += load_rows(source[1], batch, group, position, found, D, BD)
    if extra is not None:
        for i in range(extra.count):
            row = tl.load(entries(extra.row, batch, group) + i * count + slot)
            grad_key += load_rows(extra.key, batch, group, row, live & (row >= 0), D, BD)
            grad_value += load_rows(extra.value, batch, group, row, live & (row >= 0), D, BD)
    batch += tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    place = position if keys.log_weight is None else slot
    store_rows(target[0], batch, group, place, live, grad_key, D, BD)
    store_rows(target[1], batch, group, place, live, grad_value, D, BD)
