"""The kernels of mode "paper" that own queries: blocks and draws of all levels in one launch, and the leaf.

No level depends on another: each writes a normalised output (or dQ) and a log-sum-exp at the query's own place, and the
leaf kernel, which reads the query's own tile, merges them in the order of levels. Log-sum-exps between them are for
base 2. Without a mask and without documents there is one level and no leaf, and the level writes the result itself.

Names as in the literature: m_i, l_i, acc are the running maximum, sum and output.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, L levels, M draws, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.forward import softmax_step
from kernels.hyper_attention.gpu.local.query_gradients import query_step
from kernels.hyper_attention.gpu.local.rows import LN2, LOG2E, load_rows, store_rows
from kernels.hyper_attention.gpu.paper.ranges import block_start, locate, rows_before, segment_at, stratum

_UNSPECIALISED = ["T", "S", "exact_limit", "segments", "rows"]


@triton.jit
def _run_rows(
    starts, stops, index, T, S, exact_limit, size,
    BM: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The rows of a program: some queries of one run, which share a block.

    Returns (level, slots of lower levels, first key, keys, first key of the block, queries of the segment, places of
    the queries, which of them exist, the row of position 0 in what the level writes).
    """
    parts: tl.constexpr = (SIZE + BM - 1) // BM
    level, h, slot, number, lower = locate(index, S, T, exact_limit, size, parts, LEAF, LEVELS, FULL, PACKED)
    first_key, last_key, first_query, last_query, _ = segment_at(
        starts, stops, slot, h, T, S, exact_limit, FULL, PACKED
    )
    within = number % parts * BM + tl.arange(0, BM)
    place = first_query + number // parts * size + within
    live = (place < last_query) & (within < size)
    keys, count = last_key - first_key, last_query - first_query
    begin = block_start(number // parts, keys, count, size)
    origin = place * 0
    if FULL == 0:
        first = rows_before(level, S, exact_limit, LEAF, LEVELS, FULL, PACKED)
        origin += first + tl.maximum(slot, 0) * h - last_key + (S - T)
    return level, lower + slot, first_key, keys, begin, count, place, live, origin


@triton.jit
def draws_at(
    order, ranks, first_key, keys, begin, count, size, first, M: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(positions, log2 weights, which exist) of BN draws from `first` on, for queries whose block starts at `begin`."""
    draw = first + tl.arange(0, BN)
    _, width = stratum(draw, keys, size, count, M)
    there = (draw < M) & (width > 0)
    rank = tl.load(ranks + draw, mask=there, other=0)
    place = first_key + rank + tl.where(rank < begin, 0, tl.minimum(keys, size))
    position = tl.load(order + place, mask=there, other=0)
    return position, tl.log2(tl.where(there, width, 1).to(tl.float32)), there


@triton.jit(do_not_specialize=_UNSPECIALISED)
def level_kernel(
    q, k, v, query_order, key_order, ranks, starts, stops, outs, lses,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, heads, groups, T, S, exact_limit, segments, rows, scale,
    SIZE: tl.constexpr, M: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
    FINAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, Hq, rows, D] and log-sum-exp [B, Hq, rows] of the levels' queries, in the rows that `row_of` gives.

    FINAL: this is the result of the call, [B, Hq, T, D] and [B, Hq, T].
    """
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // groups
    level, segment, first_key, keys, begin, count, place, live, origin = _run_rows(
        starts + batch * S, stops + batch * S, tl.program_id(0) // heads, T, S, exact_limit, SIZE,
        BM, LEAF, LEVELS, FULL, PACKED, SIZE,
    )  # fmt: skip
    plane = (level.to(tl.int64) * batches + batch) * heads + head
    query = tl.load(query_order + plane * T + place, mask=live, other=0)
    key_plane = (level.to(tl.int64) * batches + batch) * (heads // groups) + group
    key_order += key_plane * S
    ranks += ((batch * (heads // groups) + group) * segments + segment) * M
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    acc = tl.zeros([BM, BD], tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    m_i = tl.full([BM], float("-inf"), tl.float32)
    some = tl.max(live.to(tl.int32), 0)
    stop = tl.minimum(keys, SIZE) * some
    full = stop // BN
    for i in range(full):
        position = tl.load(key_order + first_key + begin + i * BN + tl.arange(0, BN))
        k_j = load_rows(k, k_n, position, position >= 0, False, D, BD)
        v_j = load_rows(v, v_n, position, position >= 0, False, D, BD)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, live, scale, False, False, False, PRECISION)
    for i in range(full * BN, stop, BN):
        column = i + tl.arange(0, BN)
        within = column < stop
        position = tl.load(key_order + first_key + begin + column, mask=within, other=0)
        k_j = load_rows(k, k_n, position, within, True, D, BD)
        v_j = load_rows(v, v_n, position, within, True, D, BD)
        inside = within[None, :] & (place[:, None] >= 0)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, False, PRECISION)
    if M > 0:
        for i in range(0, M * some * (keys > SIZE).to(tl.int32), BN):
            position, weight, there = draws_at(key_order, ranks, first_key, keys, begin, count, SIZE, i, M, BN)
            k_j = load_rows(k, k_n, position, there, True, D, BD)
            v_j = load_rows(v, v_n, position, there, True, D, BD)
            inside = there[None, :] & (place[:, None] >= 0)
            acc, l_i, m_i = softmax_step(
                acc, l_i, m_i, q_i, k_j, v_j, weight, inside, scale, True, True, False, PRECISION
            )
    l_i = tl.where(l_i > 0, l_i, 1.0)
    lse = m_i + tl.log2(l_i)
    if FINAL:
        lse = lse * LN2
    base = (batch * heads + head) * rows
    tl.store(lses + base + origin + query, lse, mask=live)
    store_rows(outs + base * D, origin + query, live, acc / l_i[:, None], D, BD)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def level_query_gradient_kernel(
    q, k, v, grad, query_order, key_order, ranks, starts, stops, lse_2, delta, grads,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, groups, T, S, exact_limit, segments, rows, scale,
    SIZE: tl.constexpr, M: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each level's share of the gradient of its queries, [B, Hq, rows, D]; arguments as of `level_kernel`."""
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // groups
    level, segment, first_key, keys, begin, count, place, live, origin = _run_rows(
        starts + batch * S, stops + batch * S, tl.program_id(0) // heads, T, S, exact_limit, SIZE,
        BM, LEAF, LEVELS, FULL, PACKED, SIZE,
    )  # fmt: skip
    plane = (level.to(tl.int64) * batches + batch) * heads + head
    query = tl.load(query_order + plane * T + place, mask=live, other=0)
    key_plane = (level.to(tl.int64) * batches + batch) * (heads // groups) + group
    key_order += key_plane * S
    ranks += ((batch * (heads // groups) + group) * segments + segment) * M
    base = (batch * heads + head) * T
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    do = load_rows(grad + batch * g_b + head * g_h, g_n, query, live, True, D, BD)
    lse = tl.load(lse_2 + base + query, mask=live, other=0.0)
    de = tl.load(delta + base + query, mask=live, other=0.0)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    dq = tl.zeros([BM, BD], tl.float32)
    some = tl.max(live.to(tl.int32), 0)
    stop = tl.minimum(keys, SIZE) * some
    full = stop // BN
    for i in range(full):
        position = tl.load(key_order + first_key + begin + i * BN + tl.arange(0, BN))
        k_j = load_rows(k, k_n, position, position >= 0, False, D, BD)
        v_j = load_rows(v, v_n, position, position >= 0, False, D, BD)
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, live, scale, False, False, PRECISION)
    for i in range(full * BN, stop, BN):
        column = i + tl.arange(0, BN)
        within = column < stop
        position = tl.load(key_order + first_key + begin + column, mask=within, other=0)
        k_j = load_rows(k, k_n, position, within, True, D, BD)
        v_j = load_rows(v, v_n, position, within, True, D, BD)
        inside = within[None, :] & (place[:, None] >= 0)
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
    if M > 0:
        for i in range(0, M * some * (keys > SIZE).to(tl.int32), BN):
            position, weight, there = draws_at(key_order, ranks, first_key, keys, begin, count, SIZE, i, M, BN)
            k_j = load_rows(k, k_n, position, there, True, D, BD)
            v_j = load_rows(v, v_n, position, there, True, D, BD)
            inside = there[None, :] & (place[:, None] >= 0)
            dq = query_step(dq, q_i, do, lse, de, k_j, v_j, weight, inside, scale, True, True, PRECISION)
    store_rows(grads + (batch * heads + head) * rows * D, origin + query, live, dq * (scale / LOG2E), D, BD)
