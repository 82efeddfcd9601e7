"""The leaf of mode "paper": exact attention of a query's own tile, or of its short document, and the sum of the levels.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, L levels, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.forward import softmax_step
from kernels.hyper_attention.gpu.local.key_gradients import add_queries
from kernels.hyper_attention.gpu.local.query_gradients import query_step
from kernels.hyper_attention.gpu.local.rows import LN2, LOG2E, load_rows, store_rows
from kernels.hyper_attention.gpu.paper.ranges import row_of, slots_of

_UNSPECIALISED = ["T", "S", "exact_limit", "rows"]


@triton.jit
def _document(starts, stops, position, S, exact_limit, PACKED: tl.constexpr):
    """(start, end, whether long) of the document of each position."""
    if PACKED:
        start = tl.load(starts + position, mask=position < S, other=0)
        end = tl.load(stops + position, mask=position < S, other=0)
    else:
        start = position * 0
        end = start + S
    return start, end, end - start > exact_limit


@triton.jit
def leaf_span(
    starts, stops, query, T, S, exact_limit, LEAF: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """(first key, one past the last, start of the document, whether that is long, whether it exists) of each query."""
    offset = query * 0 if FULL else S - T + query * 0
    position = query + offset
    live = query < T
    start, end, long = _document(starts, stops, position, S, exact_limit, PACKED)
    if FULL:
        begin = start
        stop = tl.where(long, start, end)
    else:
        begin = tl.where(long, start + (position - start) // LEAF * LEAF, start)
        stop = tl.where(end > start, position + 1, begin)
    stop = tl.where(live, stop, begin)
    return begin, stop, start, long & live, live


@triton.jit
def spans(begin, stop, BN: tl.constexpr):
    """Key tiles: some with a mask, then some without, then some with a mask.

    Returns (first key, tiles with a mask, first key of those without, how many those are, first key of the rest, end).
    """
    some = begin < stop
    low = tl.min(tl.where(some, begin, 2147483647))
    high = tl.max(tl.where(some, stop, 0))
    low = tl.minimum(low, high)
    before = (tl.max(tl.where(some, begin, low)) - low + BN - 1) // BN
    full = low + before * BN
    count = tl.maximum(tl.min(tl.where(some, stop, 0)) - full, 0) // BN
    return low, before, full, count, full + count * BN, high


@triton.jit(do_not_specialize=_UNSPECIALISED)
def leaf_kernel(
    q, k, v, outs, lses, starts, stops, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, heads, groups, T, S, exact_limit, rows, scale,
    LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, Hq, T, D] and log-sum-exp [B, Hq, T] of the call: the leaf merged with what `level_kernel` wrote."""
    batch = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // groups
    query = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * BM + tl.arange(0, BM)
    begin, stop, start, long, live = leaf_span(
        starts + batch * S, stops + batch * S, query, T, S, exact_limit, LEAF, FULL, PACKED
    )
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    acc = tl.zeros([BM, BD], tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    m_i = tl.full([BM], float("-inf"), tl.float32)
    low, before, full, count, rest, high = spans(begin, stop, BN)
    for i in range(before):
        column = low + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] < stop[:, None]) & (column[None, :] >= begin[:, None])
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, True, PRECISION)
    for i in range(count):
        column = full + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column >= 0, False, D, BD)
        v_j = load_rows(v, v_n, column, column >= 0, False, D, BD)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, live, scale, False, False, True, PRECISION)
    for i in range(rest, high, BN):
        column = i + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] < stop[:, None]) & (column[None, :] >= begin[:, None])
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, True, PRECISION)
    base = (batch * heads + head) * T
    position = query if FULL else query + (S - T)
    plane = (batch * heads + head) * rows
    first = rows * 0
    for i in tl.static_range(LEVELS):
        reads = long
        if FULL == 0:
            reads = long & ((position - start) // (LEAF << i) % 2 == 1)
        row = row_of(position, start, first, LEAF << i, False, FULL, PACKED)
        first += slots_of(LEAF << i, S, exact_limit, FULL, PACKED) * (LEAF << i)
        part = tl.load(lses + plane + row, mask=reads, other=float("-inf"))
        theirs_out = load_rows(outs + plane * D, D, row, reads, True, D, BD).to(tl.float32)
        top = tl.maximum(m_i, part)
        shift = tl.where(top == float("-inf"), 0.0, top)
        own, theirs = tl.exp2(m_i - shift), tl.exp2(part - shift)
        acc = acc * own[:, None] + theirs_out * theirs[:, None]
        l_i = l_i * own + theirs
        m_i = top
    some = l_i > 0
    l_i = tl.where(some, l_i, 1.0)
    tl.store(lse + base + query, tl.where(some, (m_i + tl.log2(l_i)) * LN2, float("-inf")), mask=live)
    store_rows(out + base * D, query, live, acc / l_i[:, None], D, BD)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def leaf_query_gradient_kernel(
    q, k, v, grad, grads, starts, stops, lse_2, delta, grad_q,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, heads, groups, T, S, exact_limit, rows, scale,
    LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, [B, Hq, T, D]: the leaf's plus those of `level_query_gradient_kernel`."""
    batch = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // groups
    query = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * BM + tl.arange(0, BM)
    begin, stop, start, long, live = leaf_span(
        starts + batch * S, stops + batch * S, query, T, S, exact_limit, LEAF, FULL, PACKED
    )
    base = (batch * heads + head) * T
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    do = load_rows(grad + batch * g_b + head * g_h, g_n, query, live, True, D, BD)
    lse = tl.load(lse_2 + base + query, mask=live, other=0.0)
    de = tl.load(delta + base + query, mask=live, other=0.0)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    dq = tl.zeros([BM, BD], tl.float32)
    low, before, full, count, rest, high = spans(begin, stop, BN)
    for i in range(before):
        column = low + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] < stop[:, None]) & (column[None, :] >= begin[:, None])
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
    for i in range(count):
        column = full + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column >= 0, False, D, BD)
        v_j = load_rows(v, v_n, column, column >= 0, False, D, BD)
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, live, scale, False, False, PRECISION)
    for i in range(rest, high, BN):
        column = i + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] < stop[:, None]) & (column[None, :] >= begin[:, None])
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
    dq *= scale / LOG2E
    position = query if FULL else query + (S - T)
    first = rows * 0
    for i in tl.static_range(LEVELS):
        reads = long
        if FULL == 0:
            reads = long & ((position - start) // (LEAF << i) % 2 == 1)
        row = row_of(position, start, first, LEAF << i, False, FULL, PACKED)
        first += slots_of(LEAF << i, S, exact_limit, FULL, PACKED) * (LEAF << i)
        dq += load_rows(grads + (batch * heads + head) * rows * D, D, row, reads, True, D, BD).to(tl.float32)
    store_rows(grad_q + base * D, query, live, dq, D, BD)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def leaf_key_gradient_kernel(
    q, k, v, grad, grads_k, grads_v, starts, stops, lse_2, delta, grad_k, grad_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, heads, groups, T, S, exact_limit, rows, scale,
    LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, [B, Hk, S, D]: the leaf's plus those of `level_key_gradient_kernel`."""
    batch = tl.program_id(1).to(tl.int64)
    group = (tl.program_id(0) % heads).to(tl.int64)
    position = tl.program_id(0) // heads * BN + tl.arange(0, BN)
    live = position < S
    start, end, long = _document(starts + batch * S, stops + batch * S, position, S, exact_limit, PACKED)
    # The queries that read the key in the leaf: first .. last, as numbers of queries.
    if FULL:
        first = start
        last = tl.where(long, start, end)
    else:
        first = tl.maximum(position - (S - T), 0)
        tile = tl.minimum(start + ((position - start) // LEAF + 1) * LEAF, end)
        last = tl.maximum(tl.where(long, tile, end) - (S - T), 0)
    last = tl.where(live, tl.maximum(first, last), first)
    some = first < last
    high = tl.max(tl.where(some, last, 0))
    low = tl.minimum(tl.min(tl.where(some, first, 2147483647)), high)
    k_j = load_rows(k + batch * k_b + group * k_h, k_n, position, live, True, D, BD)
    v_j = load_rows(v + batch * v_b + group * v_h, v_n, position, live, True, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for member in range(groups):
        head = group * groups + member
        base = (batch * heads * groups + head) * T
        q_ = q + batch * q_b + head * q_h
        grad_ = grad + batch * g_b + head * g_h
        dk, dv = add_queries(
            dk, dv, k_j, v_j, q_, grad_, lse_2 + base, delta + base, q_n, g_n, low, high, 0, first, last, scale,
            D, BD, BM, PRECISION,
        )  # fmt: skip
    dk *= scale / LOG2E
    plane = (batch * heads + group) * rows * D
    row_first = rows * 0
    for i in tl.static_range(LEVELS):
        h = LEAF << i
        has = long & live
        if FULL == 0:
            tile = (position - start) // h
            has = has & (tile % 2 == 0) & (start + (tile + 1) * h < end)
        row = row_of(position, start, row_first, h, True, FULL, PACKED)
        row_first += slots_of(h, S, exact_limit, FULL, PACKED) * h
        dk += load_rows(grads_k + plane, D, row, has, True, D, BD).to(tl.float32)
        dv += load_rows(grads_v + plane, D, row, has, True, D, BD).to(tl.float32)
    store_rows(grad_k + (batch * heads + group) * S * D, position, live, dk, D, BD)
    store_rows(grad_v + (batch * heads + group) * S * D, position, live, dv, D, BD)
