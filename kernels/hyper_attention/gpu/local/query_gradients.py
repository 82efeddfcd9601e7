"""The kernels that own queries in the backward pass of mode "causal_local": delta and dQ.

With the output and log-sum-exp of the whole softmax, each key gives p = exp(s - lse), ds = p (dO V^T - delta) and
dQ += ds K, where delta = dO . O - dLSE.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, N slots of tiles, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.forward import program_rows, window_spans
from kernels.hyper_attention.gpu.local.rows import LOG2E, load_rows, store_rows


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    grad, out, grad_lse, lse, delta, lse_2, g_b, g_h, g_n, heads, T,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Write delta = dO . O - dLSE, and the log-sum-exp for base 2 with 0 in place of -inf; fp32 [B, Hq, T]."""
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = row < T
    base = (batch * heads + head) * T
    product = load_rows(grad + batch * g_b + head * g_h, g_n, row, live, True, D, BD).to(tl.float32)
    product *= load_rows(out + base * D, D, row, live, True, D, BD).to(tl.float32)
    value = tl.load(lse + base + row, mask=live, other=0.0)
    some = value > float("-inf")
    result = tl.sum(product, 1)
    if HAS_LSE:
        result -= tl.load(grad_lse + base + row, mask=live & some, other=0.0)
    tl.store(delta + base + row, result, mask=live)
    tl.store(lse_2 + base + row, tl.where(some, value * LOG2E, 0.0), mask=live)


@triton.jit
def query_step(
    dq, q, do, lse, delta, k, v, bias, inside, scale,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to dQ / scale."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BIASED:
        p = tl.exp2(s * scale + (bias[None, :] - lse[:, None]))
    else:
        p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(inside, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S", "P", "N", "first_block", "exact_limit", "window", "sinks"])
def query_gradient_kernel(
    q, k, v, grad, mean_k, mean_v, listed, firsts, counts, first_of, starts, stops, lse_2, delta, grad_q,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, groups, T, S, P, N, first_block, exact_limit, window, sinks, scale,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, PACKED: tl.constexpr, MEANS: tl.constexpr, LISTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, [B, Hq, T, D]; loops and further arguments are those of `attend_kernel`.

    Args:
        grad: dO, [B, Hq, T, D] with the strides g_b, g_h, g_n.
        lse_2, delta: as `delta_kernel` writes them.
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
    base = (batch * heads + head) * T
    q_i = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    do = load_rows(grad + batch * g_b + head * g_h, g_n, query, live, True, D, BD)
    lse = tl.load(lse_2 + base + query, mask=live, other=0.0)
    de = tl.load(delta + base + query, mask=live, other=0.0)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    dq = tl.zeros([BM, BD], tl.float32)
    low, before, full, count, rest, high = window_spans(position, live, begin, careful, BN)
    for i in range(rest, high, BN):
        column = i + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column < high, True, D, BD)
        v_j = load_rows(v, v_n, column, column < high, True, D, BD)
        inside = (column[None, :] <= position[:, None]) & (column[None, :] >= begin[:, None])
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
    for i in range(count):
        column = full + i * BN + tl.arange(0, BN)
        k_j = load_rows(k, k_n, column, column >= 0, False, D, BD)
        v_j = load_rows(v, v_n, column, column >= 0, False, D, BD)
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, live, scale, False, False, PRECISION)
    if PACKED:
        for i in range(before):
            column = low + i * BN + tl.arange(0, BN)
            k_j = load_rows(k, k_n, column, column < high, True, D, BD)
            v_j = load_rows(v, v_n, column, column < high, True, D, BD)
            inside = (column[None, :] <= position[:, None]) & (column[None, :] >= begin[:, None])
            dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
    for i in range(0, tl.minimum(sinks, older), 16):
        column = i + tl.arange(0, 16)
        within = column < tl.minimum(sinks, older)
        k_j = load_rows(k, k_n, start + column, within, True, D, BD)
        v_j = load_rows(v, v_n, start + column, within, True, D, BD)
        inside = within[None, :] & (local[:, None] >= 0)
        dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
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
            dq = query_step(dq, q_i, do, lse, de, k_j, v_j, scale, inside, scale, False, True, PRECISION)
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
            dq = query_step(dq, q_i, do, lse, de, k_j, v_j, bias, inside, scale, True, True, PRECISION)
    store_rows(grad_q + base * D, query, live, dq * (scale / LOG2E), D, BD)
