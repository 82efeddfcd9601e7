"""The kernels that own keys in mode "causal_local": gradients of means, and of the keys and values themselves.

Every row of a result has one program that writes it. With the output and log-sum-exp of the whole softmax, each key
gives p = exp(s - lse), dV += p^T dO, ds = p (dO V^T - delta), dK += ds^T Q.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, N slots of tiles, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.rows import LOG2E, load_rows, store_rows, tile_at


@triton.jit
def key_step(
    dk, dv, k, v, q, do, lse, delta, bias, inside, scale,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to (dK / scale, dV); `inside` is [keys, queries]."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if BIASED:
        p = tl.exp2(s * scale + (bias[:, None] - lse[None, :]))
    else:
        p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where(inside, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "P", "N", "first_block", "exact_limit", "window", "sinks"])
def mean_gradient_kernel(
    q, grad, mean_k, mean_v, first_of, starts, stops, lse_2, delta, grad_means,
    q_b, q_h, q_n, g_b, g_h, g_n, heads, groups, T, S, P, N, first_block, exact_limit, window, sinks, scale,
    L: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, PACKED: tl.constexpr, LISTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of mean keys and values, fp32 [pieces, 2, B, Hk, P, D], to be summed over the pieces.

    Many queries read each mean, so the programs along the third axis share the tiles of queries among them.
    """
    batch, group = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    batches = tl.num_programs(1).to(tl.int64)
    piece = tl.program_id(2)
    first = tl.program_id(0) // heads * BN
    segment = first + tl.arange(0, BN)
    exists = segment < P
    starts += batch * S
    stops += batch * S
    mean_k += (batch * heads + group) * P * D
    mean_v += (batch * heads + group) * P * D
    k = load_rows(mean_k, D, segment, exists, True, D, BD)
    v = load_rows(mean_v, D, segment, exists, True, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    # The slots of tiles whose rows may read one of these means.
    if PACKED:
        low = tl.maximum(first * L // TILE - first_block, 0) * 2
        end = tl.load(stops + tl.minimum((first + BN) * L, S) - 1)
        high = tl.minimum(((end + TILE - 1) // TILE - first_block) * 2, N)
    else:
        low = tl.maximum(((first + 1) * L + window + TILE - 1) // TILE - first_block, 0)
        high = N
    size = (tl.maximum(high - low, 0) + tl.num_programs(2) - 1) // tl.num_programs(2)
    low += piece * size
    high = tl.minimum(low + size, high)
    for member in range(groups):
        head = group * groups + member
        base = (batch * heads * groups + head) * T
        q_h_ = q + batch * q_b + head * q_h
        g_h_ = grad + batch * g_b + head * g_h
        for i in range(low * (TILE // BM), high * (TILE // BM)):
            slot = i // (TILE // BM)
            row, stop, start, _ = tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED, TILE)
            older = tl.maximum(row - start - window, 0) // L * L
            local = i % (TILE // BM) * BM + tl.arange(0, BM)
            query = row + local - (S - T)
            live = (row + local < stop) & (query >= 0)
            q_i = load_rows(q_h_, q_n, query, live, True, D, BD)
            do = load_rows(g_h_, g_n, query, live, True, D, BD)
            lse = tl.load(lse_2 + base + query, mask=live, other=0.0)
            de = tl.load(delta + base + query, mask=live, other=0.0)
            column = segment - start // L
            within = (column >= 0) & (column < older // L)
            bias = tl.log2(tl.where(column == 0, L - sinks, L).to(tl.float32))
            if LISTS:
                tile = (batch * heads * groups + head) * N + slot
                until = tl.load(first_of + tile * P + segment, mask=within, other=0).to(tl.int32)
                inside = local[None, :] < until[:, None]
            else:
                inside = within[:, None] & (local[None, :] >= 0)
            dk, dv = key_step(dk, dv, k, v, q_i, do, lse, de, bias, inside, scale, True, True, PRECISION)
    base = ((piece * 2 * batches + batch) * heads + group) * P * D
    store_rows(grad_means + base, segment, exists, dk * (scale / LOG2E), D, BD)
    store_rows(grad_means + base + batches * heads * P * D, segment, exists, dv, D, BD)


@triton.jit
def add_queries(
    dk, dv, k, v, q, grad, lse_2, delta, q_n, g_n, low, high, offset, first, last, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries at key positions low .. high; of these, `first` .. `last` [keys] read each key.

    There is one loop, with a mask: a second loop without one costs more in spilled registers than the mask does.
    """
    for i in range(low, high, BM):
        row = i + tl.arange(0, BM)
        within = row < high
        q_i = load_rows(q, q_n, row - offset, within, True, D, BD)
        do = load_rows(grad, g_n, row - offset, within, True, D, BD)
        lse = tl.load(lse_2 + row - offset, mask=within, other=0.0)
        de = tl.load(delta + row - offset, mask=within, other=0.0)
        inside = within[None, :] & (row[None, :] >= first[:, None]) & (row[None, :] < last[:, None])
        dk, dv = key_step(dk, dv, k, v, q_i, do, lse, de, scale, inside, scale, False, True, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "P", "N", "exact_limit", "window", "sinks"])
def key_gradient_kernel(
    q, k, v, grad, grad_means, readers, reader_counts, starts, stops, lse_2, delta, grad_k, grad_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, groups, T, S, P, N, exact_limit, window, sinks, scale,
    L: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, PACKED: tl.constexpr, MEANS: tl.constexpr, LISTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, [B, Hk, S, D], from the window, the sinks, the lists and the means.

    A program owns BN keys of one segment (BN divides L), cut from the document's start; with documents every third
    program owns a block of keys of exact documents and of padding.

    Args:
        grad_means: fp32 [2, B, Hk, P, D], summed.
        readers, reader_counts: as `invert_kernel` writes them.
    """
    batch, group = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads
    starts += batch * S
    stops += batch * S
    kind = slot * 0
    if PACKED:
        kind = slot % 3
        slot = slot // 3 * 2 + tl.minimum(kind, 1)
    first, stop, start, end = tile_at(starts, stops, slot, 0, S, exact_limit, PACKED, BN)
    position = first + tl.arange(0, BN)
    live = position < stop
    local = first - start
    segment = local // L
    last_tile = ((segment + 1) * L + window + TILE - 1) // TILE
    reach = tl.minimum(start + last_tile * TILE, end)
    until = reach + position * 0
    whole = start + (segment + 1) * L <= end
    if PACKED:
        whole = whole & (first < stop)
        if kind == 2:
            position = slot // 2 * BN + tl.arange(0, BN)
            begin = tl.load(starts + position, mask=position < S, other=0)
            until = tl.load(stops + position, mask=position < S, other=0)
            live = (position < S) & (until - begin <= exact_limit)
            whole = whole & (kind != 2)
    offset = S - T
    k_j = load_rows(k + batch * k_b + group * k_h, k_n, position, live, True, D, BD)
    v_j = load_rows(v + batch * v_b + group * v_h, v_n, position, live, True, D, BD)
    # Sinks are read to the end of their document.
    until = tl.where(position - start < tl.where(kind == 2, -S, sinks), tl.maximum(until, end), until)
    until = tl.where(live, until, position)
    low = tl.maximum(tl.min(tl.where(live, position, 2147483647)), offset)
    high = tl.max(tl.where(live, until, 0))
    low = tl.minimum(low, high)  # pipelined loads run a few steps ahead, and bounds plus steps must not overflow
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for member in range(groups):
        head = group * groups + member
        base = (batch * heads * groups + head) * T
        q_ = q + batch * q_b + head * q_h
        grad_ = grad + batch * g_b + head * g_h
        dk, dv = add_queries(
            dk, dv, k_j, v_j, q_, grad_, lse_2 + base, delta + base, q_n, g_n, low, high, offset, position, until,
            scale, D, BD, BM, PRECISION,
        )  # fmt: skip
        if LISTS:
            listed = (batch * heads * groups + head) * P + tl.minimum(start // L + segment, P - 1)
            count = tl.where(whole, tl.load(reader_counts + listed), 0)
            for i in range(count * (TILE // BM)):
                entry = tl.load(readers + listed * N + i // (TILE // BM))
                row = i % (TILE // BM) * BM + tl.arange(0, BM)
                query = entry // 256 + row - offset
                inside = (row >= entry % 256) & (query >= 0) & (entry // 256 + row < end)
                q_i = load_rows(q_, q_n, query, inside, True, D, BD)
                do = load_rows(grad_, g_n, query, inside, True, D, BD)
                lse = tl.load(lse_2 + base + query, mask=inside, other=0.0)
                de = tl.load(delta + base + query, mask=inside, other=0.0)
                mask = inside[None, :] & (position - start >= sinks)[:, None]
                dk, dv = key_step(dk, dv, k_j, v_j, q_i, do, lse, de, scale, mask, scale, False, True, PRECISION)
    dk *= scale / LOG2E
    if MEANS:
        batches = tl.num_programs(1).to(tl.int64)
        column = tl.arange(0, BD)
        at = ((batch * heads + group) * P + tl.minimum(start // L + segment, P - 1)) * D + column
        there = column < tl.where(whole, D, 0)
        share = tl.where(position - start >= sinks, 1.0, 0.0) / (L - tl.where(segment == 0, sinks, 0))
        dk += tl.load(grad_means + at, mask=there, other=0.0)[None, :] * share[:, None]
        dv += tl.load(grad_means + at + batches * heads * P * D, mask=there, other=0.0)[None, :] * share[:, None]
    store_rows(grad_k + (batch * heads + group) * S * D, position, live, dk, D, BD)
    store_rows(grad_v + (batch * heads + group) * S * D, position, live, dv, D, BD)
