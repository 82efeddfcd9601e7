"""The forward kernel of mode "causal_local": window, sinks, listed segments and means of a tile in one online softmax.

Logits are in base 2 inside; the log-sum-exp in memory is natural. The rows of a tile share its lists and its means; a
program holds all of them or a part. Every row reads its own key first, so its largest logit is finite from the first
step on, and later masks cannot give NaN.

Names as in the literature: m_i, l_i, acc are the running maximum, sum and output; p the unnormalised weights.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.rows import LN2, load_rows, store_rows, tile_at


@triton.jit
def softmax_step(
    acc, l_i, m_i, q, k, v, bias, inside, scale,
    BIASED: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys; `scale` and `bias` are for base 2. GUARDED: a row may not have read any key yet."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIASED:
        s = s * scale + bias[None, :]
        if MASKED:
            s = tl.where(inside, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        fade = tl.exp2(m_i - m_new)
    else:
        if MASKED:
            s = tl.where(inside, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        shift = m_new
        if GUARDED:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale - shift[:, None])
        fade = tl.exp2(m_i - shift)
    l_i = l_i * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, l_i, m_new


@triton.jit
def program_rows(
    starts, stops, heads, first_block, S, exact_limit, window,
    BM: tl.constexpr, L: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The rows of a program; the last tiles come first, and the head changes fastest.

    Returns (slot, positions [BM], rows of the tile [BM], live [BM], first key of each row's window [BM], start of the
    document, tokens before the window, whether every key tile needs its mask). With documents every third program works
    on a block of the rows that are exact or padding, which have neither means nor lists.
    """
    index = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    part = index % (TILE // BM)
    slot = index // (TILE // BM)
    kind = slot * 0
    if PACKED:
        kind = slot % 3
        slot = slot // 3 * 2 + tl.minimum(kind, 1)
    row, stop, start, _ = tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED, TILE)
    older = tl.maximum(row - start - window, 0) // L * L
    local = part * BM + tl.arange(0, BM)
    position = row + local
    live = position < stop
    begin = start + older + local * 0
    careful = kind == 2
    if PACKED:
        if kind == 2:
            position = (first_block + slot // 2) * TILE + local
            begin = tl.load(starts + position, mask=position < S, other=0)
            end = tl.load(stops + position, mask=position < S, other=0)
            live = (position < S) & (end - begin <= exact_limit)
            # Padding reads nothing.
            careful = tl.max((live & (end == begin)).to(tl.int32), 0) > 0
            begin = tl.where(end > begin, begin, position + 1)
            older = older * 0
    return slot, position, local, live, begin, start, older, careful


@triton.jit
def window_spans(position, live, begin, careful, BN: tl.constexpr):
    """Key tiles of the window: some with a mask, then some without, then some with a mask.

    Returns (first key, tiles with a mask, first key of those without, how many those are, first key of the rest, end).
    Each row ends at its own key, so the last keys need a mask; the first need one if the rows begin at different keys.
    """
    low = tl.min(tl.where(live, begin, 2147483647))
    high = tl.max(tl.where(live, position + 1, 0))
    low = tl.minimum(low, high)
    apart = tl.max(tl.where(live & (begin <= position), begin, low))
    head = (apart - low + BN - 1) // BN
    full = low + head * BN
    row = tl.min(position)
    count = tl.where(careful, 0, tl.maximum(tl.minimum(row, high) - full, 0) // BN)
    return low, head, full, count, full + count * BN, high


@triton.jit(do_not_specialize=["T", "S", "P", "N", "first_block", "exact_limit", "window", "sinks"])
def attend_kernel(
    q, k, v, mean_k, mean_v, listed, firsts, counts, first_of, starts, stops, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    heads, groups, T, S, P, N, first_block, exact_limit, window, sinks, scale,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, PACKED: tl.constexpr, MEANS: tl.constexpr, LISTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, Hq, T, D] and log-sum-exp [B, Hq, T] of each query.

    Args:
        q, k, v: [B, H, N, D] with the strides that follow.
        mean_k, mean_v: [B, Hk, P, D].
        listed, firsts, counts, first_of: as `lists_kernel` writes them.
        starts, stops: int32 [B, S], the document of each token; not read unless PACKED.
        sinks: first tokens of a document that all its queries read.
        scale: of the logits, in base 2.
    """
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    group = head // groups
    starts += batch * S
    stops += batch * S
    slot, position, local, live, begin, start, older, careful = program_rows(
        starts, stops, heads, first_block, S, exact_limit, window, BM, L, TILE, PACKED
    )
    query = position - (S - T)
    live = live & (query >= 0)
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    acc = tl.zeros([BM, BD], tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    m_i = tl.full([BM], float("-inf"), tl.float32)
    low, before, full, count, rest, high = window_spans(position, live, begin, careful, BN)
    for i in range(rest, high, BN):
        column = i + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] <= position[:, None]) & (column[None, :] >= begin[:, None])
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, True, PRECISION)
    for i in range(count):
        column = full + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column >= 0, False, D, BD)
        v_j = load_rows(v, v_n, column, column >= 0, False, D, BD)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, live, scale, False, False, PACKED, PRECISION)
    if PACKED:
        for i in range(before):
            column = low + i * BN + tl.arange(0, BN)
            k_j = load_rows(k, k_n, column, column < high, True, D, BD)
            v_j = load_rows(v, v_n, column, column < high, True, D, BD)
            inside = (column[None, :] <= position[:, None]) & (column[None, :] >= begin[:, None])
            acc, l_i, m_i = softmax_step(
                acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, True, PRECISION
            )
    for i in range(0, tl.minimum(sinks, older), 16):
        column = i + tl.arange(0, 16)
        within = column < tl.minimum(sinks, older)
        k_j = load_rows(k, k_n, start + column, within, True, D, BD)
        v_j = load_rows(v, v_n, start + column, within, True, D, BD)
        inside = within[None, :] & (local[:, None] >= 0)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, PACKED, PRECISION)
    tile = (batch * heads + head) * N + slot
    BL: tl.constexpr = L if L < BN else BN
    if LISTS:
        entries = tl.where(older > 0, tl.load(counts + tile, mask=older > 0, other=0), 0)
        for i in range(entries * (L // BL)):
            segment = tl.load(listed + tile * C + i // (L // BL))
            since = tl.load(firsts + tile * C + i // (L // BL))
            column = (segment - start // L) * L + i % (L // BL) * BL + tl.arange(0, BL)
            k_j = load_rows(k, k_n, start + column, column >= 0, False, D, BD)
            v_j = load_rows(v, v_n, start + column, column >= 0, False, D, BD)
            inside = (local >= since)[:, None] & (column >= sinks)[None, :]
            acc, l_i, m_i = softmax_step(
                acc, l_i, m_i, q_i, k_j, v_j, scale, inside, scale, False, True, PACKED, PRECISION
            )
    if MEANS:
        mean_k += ((batch * (heads // groups) + group) * P + start // L) * D
        mean_v += ((batch * (heads // groups) + group) * P + start // L) * D
        for i in range(0, older // L, BN):
            column = i + tl.arange(0, BN)
            within = column < older // L
            k_j = load_rows(mean_k, D, column, within, True, D, BD)
            v_j = load_rows(mean_v, D, column, within, True, D, BD)
            bias = tl.log2(tl.where(column == 0, L - sinks, L).to(tl.float32))
            if LISTS:
                until = tl.load(first_of + tile * P + start // L + column, mask=within, other=0).to(tl.int32)
                inside = local[:, None] < until[None, :]
            else:
                inside = within[None, :] & (local[:, None] >= 0)
            acc, l_i, m_i = softmax_step(
                acc, l_i, m_i, q_i, k_j, v_j, bias, inside, scale, True, True, False, PRECISION
            )
    some = l_i > 0
    l_i = tl.where(some, l_i, 1.0)
    base = (batch * heads + head) * T
    tl.store(lse + base + query, tl.where(some, (m_i + tl.log2(l_i)) * LN2, float("-inf")), mask=live)
    store_rows(out + base * D, query, live, acc / l_i[:, None], D, BD)
