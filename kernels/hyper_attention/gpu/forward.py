"""The forward kernel: one online softmax over all keys that a launch gives to a tile of queries.

The tile starts from what earlier launches left, an output and a log-sum-exp: parts merge without a further pass.
Logits are in base 2 inside; log-sum-exps in memory are natural.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size; BM, BN, BD: rows, keys, columns of
a tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.tiles import (
    LN2,
    LOG2E,
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


class Draws(NamedTuple):
    """The sampled keys of a level, M for each of its segments.

    Attributes:
        segment: [B, T], segment of each query slot, or -1.
        split: [B, Hk, P * M], query slot from which on the draw is at `before`, not at `after` the block.
        before: [B, Hk, P * M], position of the draw if its rank lies before the block.
        after: [B, Hk, P * M], if it lies after the block.
        log_weight: [B, P * M], fp32, -inf: no draw.
        count: M.
    """

    segment: Table
    split: Table
    before: Table
    after: Table
    log_weight: Table
    count: Any


@triton.jit
def _softmax(state, query, key, value, weight, inside, scale, PRECISION: tl.constexpr):
    """Add a tile of keys to (accumulator, total, peak); scale and weight are for base 2."""
    out, total, peak = state
    logits = tl.dot(query[0], tl.trans(key), input_precision=PRECISION) * scale
    if weight is not None:
        logits += weight[None, :]
    if inside is None:
        top = tl.maximum(peak, tl.max(logits, 1))
        shift = top
    else:
        logits = tl.where(inside, logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(share, 1)
    out = tl.dot(share.to(value.dtype), value, out * fade[:, None], input_precision=PRECISION)
    return out, total, top


@triton.jit
def read_ranges(
    state, query, keys, batch, head, group, slot, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, VISIT: tl.constexpr,
):  # fmt: skip
    """Give VISIT every key in the ranges of the query slots; tiles that all of them read have no mask."""
    start = tl.load(entries(keys.ranges.start, batch, head) + slot)
    stop = tl.load(entries(keys.ranges.stop, batch, head) + slot)
    low, full, count, resume, high = spans(start, stop, BN, LOOSE=False)
    for i in range(count):
        column = full + i * BN + tl.arange(0, BN)
        weight = None
        if keys.log_weight is not None:
            weight = tl.load(entries(keys.log_weight, batch, group) + column) * LOG2E
        position = positions(keys.order, batch, group, column, None)
        key = load_rows(keys.key, batch, group, position, None, D, BD)
        value = load_rows(keys.value, batch, group, position, None, D, BD)
        inside = None
        if keys.hidden is not None:
            inside = reads(keys.hidden, batch, head, slot, None, column)
        state = VISIT(state, query, key, value, weight, inside, scale, PRECISION)
    for i in range(edges(low, full, resume, high, BN)):
        first, limit = edge(i, low, full, resume, high, BN)
        column = first + tl.arange(0, BN)
        within = column < limit
        weight = None
        if keys.log_weight is not None:
            weight = tl.load(entries(keys.log_weight, batch, group) + column, mask=within, other=0.0) * LOG2E
        position = positions(keys.order, batch, group, column, within)
        key = load_rows(keys.key, batch, group, position, within, D, BD)
        value = load_rows(keys.value, batch, group, position, within, D, BD)
        inside = within[None, :] & (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
        if keys.hidden is not None:
            inside = inside & reads(keys.hidden, batch, head, slot, None, column)
        state = VISIT(state, query, key, value, weight, inside, scale, PRECISION)
    return state


@triton.jit
def read_draws(
    state, query, keys, draws, batch, head, group, slot, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, VISIT: tl.constexpr,
):  # fmt: skip
    """Give VISIT the draws of the query slots; those that share segment and block, as most tiles do, share draws."""
    segment = tl.load(entries(draws.segment, batch, head) + slot)
    start = tl.load(entries(keys.ranges.start, batch, head) + slot)
    left = segment >= 0
    while tl.max(left.to(tl.int32)) > 0:
        leader = tl.min(tl.where(left, slot, 2147483647))
        number = tl.max(tl.where(slot == leader, segment, 0))
        member = left & (segment == number) & (start == tl.max(tl.where(slot == leader, start, 0)))
        for first in range(0, draws.count, BN):
            draw = first + tl.arange(0, BN)
            within = draw < draws.count
            draw += number * draws.count
            weight = tl.load(entries(draws.log_weight, batch, group) + draw, mask=within, other=float("-inf")) * LOG2E
            split = tl.load(entries(draws.split, batch, group) + draw, mask=within, other=0)
            before = tl.load(entries(draws.before, batch, group) + draw, mask=within, other=0)
            after = tl.load(entries(draws.after, batch, group) + draw, mask=within, other=0)
            position = tl.where(leader < split, after, before)
            key = load_rows(keys.key, batch, group, position, within, D, BD)
            value = load_rows(keys.value, batch, group, position, within, D, BD)
            inside = member[:, None] & (weight > float("-inf"))[None, :]
            state = VISIT(state, query, key, value, weight, inside, scale, PRECISION)
        left = left & (member == 0)
    return state


@triton.jit
def read_all(
    state, query, near, sinks, pooled, draws, batch, head, group, slot, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, VISIT: tl.constexpr,
):  # fmt: skip
    """Give VISIT all keys of the query slots; parts that a launch lacks are None."""
    if pooled is not None:
        state = read_ranges(state, query, pooled, batch, head, group, slot, scale, D, BD, BN, PRECISION, VISIT)
    if sinks is not None:
        state = read_ranges(state, query, sinks, batch, head, group, slot, scale, D, BD, BN, PRECISION, VISIT)
    state = read_ranges(state, query, near, batch, head, group, slot, scale, D, BD, BN, PRECISION, VISIT)
    if draws is not None:
        state = read_draws(state, query, near, draws, batch, head, group, slot, scale, D, BD, BN, PRECISION, VISIT)
    return state


@triton.jit
def query_tile(near, order, heads, groups, queries, BM: tl.constexpr, ALL: tl.constexpr):
    """Where a program works: (batch, query head, key head, slots, positions, which of them exist and have keys).

    Heads are the fastest, tiles run from the last to the first: it may have the most keys. Slots that do not exist
    repeat the last one. ALL: rows without keys in this launch count too.
    """
    program = tl.program_id(0)
    batch, head = tl.program_id(1).to(tl.int64), (program % heads).to(tl.int64)
    tile = tl.num_programs(0) // heads - 1 - program // heads
    index = tile * BM + tl.arange(0, BM)
    slot = tl.minimum(index, queries - 1)
    live = index < queries
    if not ALL:
        start = tl.load(entries(near.ranges.start, batch, head) + slot)
        live = live & (start < tl.load(entries(near.ranges.stop, batch, head) + slot))
    return batch, head, head // groups, slot, positions(order, batch, head, slot, None), live


@triton.jit
def forward_kernel(
    q, source, target, lse, query_order, near, sinks, pooled, draws, scale, heads, groups, queries,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge the launch's keys into the output and log-sum-exp of each query.

    Args:
        q: Rows [B, Hq, T, D].
        source: Rows of what earlier launches left where lse > -inf, fp32; None: this is the first.
        target: Rows of the output; rows without keys in this launch are written only if ALL.
        lse: Table [B, Hq, T], fp32, read (-inf: nothing yet) and written.
        query_order: Table [B, Hq, T], or None.
        near, sinks, pooled: Keys; the last two may be None.
        draws: Draws, whose keys and values are those of `near`, or None.
        scale: of the logits, in base 2.
        heads, groups, queries: Hq, Hq / Hk, T.
    """
    batch, head, group, slot, position, live = query_tile(near, query_order, heads, groups, queries, BM, ALL)
    lse_pointer = entries(lse, batch, head) + position
    if source is None:
        peak = tl.full([BM], float("-inf"), tl.float32)
        out = tl.zeros([BM, BD], tl.float32)
    else:
        peak = tl.load(lse_pointer, mask=live, other=float("-inf")) * LOG2E
        out = load_rows(source, batch, head, position, peak > float("-inf"), D, BD).to(tl.float32)
    total = tl.where(peak > float("-inf"), 1.0, 0.0)
    query = (load_rows(q, batch, head, position, live, D, BD),)
    out, total, peak = read_all(
        (out, total, peak), query, near, sinks, pooled, draws, batch, head, group, slot, scale,
        D, BD, BN, PRECISION, _softmax,
    )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse_pointer, (peak + tl.log2(total)) * LN2, mask=live & some)
    store_rows(target, batch, head, position, live, out / total[:, None], D, BD)


@triton.jit
def pool_kernel(x, mean, start, skip, length, heads, D: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr):
    """Mean of `length` rows of x from `start` on without the first `skip`, for each segment; summed in fp32."""
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    segment = tl.program_id(0) // heads
    first = tl.load(entries(start, batch, head) + segment)
    left_out = tl.load(entries(skip, batch, head) + segment)
    total = tl.zeros([BD], tl.float32)
    for i in range(0, length, BL):
        within = i + tl.arange(0, BL)
        tile = load_rows(x, batch, head, first + within, (within >= left_out) & (within < length), D, BD)
        total += tl.sum(tile.to(tl.float32), 0)
    row = segment + tl.zeros([1], tl.int32)
    store_rows(mean, batch, head, row, row >= 0, (total / (length - left_out))[None, :], D, BD)
