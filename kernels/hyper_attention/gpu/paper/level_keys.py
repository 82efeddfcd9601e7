"""The kernels of mode "paper" that own the keys of the levels.

The first computes the gradients of the draws; the second those of the sorted keys, and adds the first's to them.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, L levels, M draws, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.key_gradients import key_step
from kernels.hyper_attention.gpu.local.rows import LOG2E, load_rows, store_rows
from kernels.hyper_attention.gpu.paper.ranges import (
    first_runs,
    height,
    locate,
    rows_before,
    segment_at,
    slots_of,
    stratum,
)

_UNSPECIALISED = ["T", "S", "exact_limit", "segments", "pieces", "rows"]


@triton.jit
def first_piece(
    level, slot, number, S, T, exact_limit, PIECE: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    FULL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Number of a piece of a slot among the pieces of all levels; a slot has one for each PIECE of its queries."""
    result = number
    for i in tl.static_range(LEVELS):
        h = height(i, S, T, LEAF, FULL)
        per_slot = (h + PIECE - 1) // PIECE
        result += tl.where(i < level, slots_of(h, S, exact_limit, FULL, PACKED) * per_slot, 0)
        result += tl.where(i == level, slot * per_slot, 0)
    return result


@triton.jit
def _tiles(SIZE: tl.constexpr, BM: tl.constexpr):
    """Tiles of BM queries of a run."""
    return (SIZE + BM - 1) // BM


@triton.jit
def _queries_at(i, count, SIZE: tl.constexpr, BM: tl.constexpr):
    """(run, places in the segment, which exist) of the i-th tile of BM queries; a run has whole tiles."""
    run = i // _tiles(SIZE, BM)
    row = run * SIZE + i % _tiles(SIZE, BM) * BM + tl.arange(0, BM)
    return run, row, row < tl.minimum((run + 1) * SIZE, count)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def draw_gradient_kernel(
    q, k, v, grad, query_order, key_order, ranks, starts, stops, lse_2, delta, draws,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, groups, T, S, exact_limit, segments, pieces, rows, scale,
    SIZE: tl.constexpr, M: tl.constexpr, PIECE: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    FULL: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the drawn keys and values, [2, B, Hk, pieces, 2, M, D].

    A draw is a rank among the keys outside the block. For queries whose block lies after it, it is the key of that
    rank; for the other queries it is the key one block further. Many queries read a draw: a program takes PIECE of
    them.
    """
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    group = (tl.program_id(0) % heads).to(tl.int64)
    tiles: tl.constexpr = (M + BN - 1) // BN
    level, h, slot, number, lower = locate(
        tl.program_id(0) // heads, S, T, exact_limit, PIECE, 2 * tiles, LEAF, LEVELS, FULL, PACKED
    )
    piece, tile = number // (2 * tiles), number % (2 * tiles)
    behind = tile // tiles
    first_key, last_key, first_query, last_query, _ = segment_at(
        starts + batch * S, stops + batch * S, slot, h, T, S, exact_limit, FULL, PACKED
    )
    keys, count = last_key - first_key, last_query - first_query
    draw = tile % tiles * BN + tl.arange(0, BN)
    _, width = stratum(draw, keys, SIZE, count, M)
    there = (draw < M) & (width > 0)
    rank = tl.load(ranks + ((batch * heads + group) * segments + lower + slot) * M + draw, mask=there, other=0)
    weight = tl.log2(tl.where(there, width, 1).to(tl.float32))
    key_plane = (level.to(tl.int64) * batches + batch) * heads + group
    at = key_order + key_plane * S + first_key + rank + behind * tl.minimum(keys, SIZE)
    position = tl.load(at, mask=there, other=0)
    k_j = load_rows(k + batch * k_b + group * k_h, k_n, position, there, True, D, BD)
    v_j = load_rows(v + batch * v_b + group * v_h, v_n, position, there, True, D, BD)
    # Runs whose block begins after the draw read the key of its rank; the runs before them read one block further.
    after = first_runs(rank, keys, count, SIZE)
    runs: tl.constexpr = (PIECE + SIZE - 1) // SIZE
    low = tl.where(behind == 0, tl.min(tl.where(there, after, 2147483647)), 0)
    high = tl.where(behind == 0, (count + SIZE - 1) // SIZE, tl.max(tl.where(there, after, 0)))
    low = tl.maximum(low, piece * runs)
    high = tl.where(tl.max(there.to(tl.int32), 0) > 0, tl.minimum(high, (piece + 1) * runs), 0)
    low = tl.minimum(low, high)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for member in range(groups):
        head = group * groups + member
        base = (batch * heads * groups + head) * T
        plane = (level.to(tl.int64) * batches + batch) * heads * groups + head
        q_ = q + batch * q_b + head * q_h
        grad_ = grad + batch * g_b + head * g_h
        for i in range(low * _tiles(SIZE, BM), high * _tiles(SIZE, BM)):
            run, row, live = _queries_at(i, count, SIZE, BM)
            query = tl.load(query_order + plane * T + first_query + row, mask=live, other=0)
            q_i = load_rows(q_, q_n, query, live, True, D, BD)
            do = load_rows(grad_, g_n, query, live, True, D, BD)
            lse = tl.load(lse_2 + base + query, mask=live, other=0.0)
            de = tl.load(delta + base + query, mask=live, other=0.0)
            reads = there & ((run >= after).to(tl.int32) + behind == 1)
            inside = live[None, :] & reads[:, None]
            dk, dv = key_step(dk, dv, k_j, v_j, q_i, do, lse, de, weight, inside, scale, True, True, PRECISION)
    index = first_piece(level, slot, piece, S, T, exact_limit, PIECE, LEAF, LEVELS, FULL, PACKED)
    base = (((batch * heads + group) * pieces + index) * 2 + behind) * M * D
    live = (draw < M) & (slot + draw * 0 >= 0)
    store_rows(draws + base, draw, live, dk * (scale / LOG2E), D, BD)
    store_rows(draws + batches * heads * pieces * 2 * M * D + base, draw, live, dv, D, BD)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def level_key_gradient_kernel(
    q, k, v, grad, query_order, key_order, ranks, draws, starts, stops, lse_2, delta, grads_k, grads_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, groups, T, S, exact_limit, segments, pieces, rows, scale,
    SIZE: tl.constexpr, M: tl.constexpr, PIECE: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    FULL: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each level's share, from blocks and draws, of the gradients of its keys and values, [B, Hk, rows, D].

    Args:
        draws: as `draw_gradient_kernel` writes them.
    """
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    group = (tl.program_id(0) % heads).to(tl.int64)
    level, h, slot, number, lower = locate(
        tl.program_id(0) // heads, S, T, exact_limit, BN, 1, LEAF, LEVELS, FULL, PACKED
    )
    first_key, last_key, first_query, last_query, _ = segment_at(
        starts + batch * S, stops + batch * S, slot, h, T, S, exact_limit, FULL, PACKED
    )
    keys, count = last_key - first_key, last_query - first_query
    width = tl.minimum(keys, SIZE)
    place = number * BN + tl.arange(0, BN)
    live = place < keys
    key_plane = (level.to(tl.int64) * batches + batch) * heads + group
    position = tl.load(key_order + key_plane * S + first_key + place, mask=live, other=0)
    k_j = load_rows(k + batch * k_b + group * k_h, k_n, position, live, True, D, BD)
    v_j = load_rows(v + batch * v_b + group * v_h, v_n, position, live, True, D, BD)
    # The runs whose block contains the key: since .. until.
    since = first_runs(place - width, keys, count, SIZE)
    until = first_runs(place, keys, count, SIZE)
    high = tl.max(tl.where(live, until, 0))
    low = tl.minimum(tl.min(tl.where(live, since, 2147483647)), high)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for member in range(groups):
        head = group * groups + member
        base = (batch * heads * groups + head) * T
        plane = (level.to(tl.int64) * batches + batch) * heads * groups + head
        q_ = q + batch * q_b + head * q_h
        grad_ = grad + batch * g_b + head * g_h
        for i in range(low * _tiles(SIZE, BM), high * _tiles(SIZE, BM)):
            run, row, within = _queries_at(i, count, SIZE, BM)
            query = tl.load(query_order + plane * T + first_query + row, mask=within, other=0)
            q_i = load_rows(q_, q_n, query, within, True, D, BD)
            do = load_rows(grad_, g_n, query, within, True, D, BD)
            lse = tl.load(lse_2 + base + query, mask=within, other=0.0)
            de = tl.load(delta + base + query, mask=within, other=0.0)
            inside = within[None, :] & ((run >= since) & (run < until))[:, None]
            dk, dv = key_step(dk, dv, k_j, v_j, q_i, do, lse, de, scale, inside, scale, False, True, PRECISION)
    dk *= scale / LOG2E
    if M > 0:
        # This key may be the draw of its stratum: if the draw's rank is its place, or its place less one block.
        ranks += ((batch * heads + group) * segments + tl.maximum(lower + slot, 0)) * M
        index = first_piece(level, slot, number * 0, S, T, exact_limit, PIECE, LEAF, LEVELS, FULL, PACKED)
        unseen = tl.maximum(keys - SIZE, 0) * (count > 0)
        size = (h + PIECE - 1) // PIECE
        for behind in tl.static_range(2):
            rank = place - behind * width
            within = live & (rank >= 0) & (rank < unseen)
            draw = (((rank.to(tl.int64) + 1) * M - 1) // tl.maximum(unseen, 1)).to(tl.int32)
            found = within & (tl.load(ranks + draw, mask=within, other=-1) == rank)
            some = tl.max(found.to(tl.int32), 0)
            for piece in range(size * some):
                base = (((batch * heads + group) * pieces + index + piece) * 2 + behind) * M * D
                dk += load_rows(draws + base, D, draw, found, True, D, BD).to(tl.float32)
                base += batches * heads * pieces * 2 * M * D
                dv += load_rows(draws + base, D, draw, found, True, D, BD).to(tl.float32)
    row = position
    if FULL == 0:
        first = rows_before(level, S, exact_limit, LEAF, LEVELS, FULL, PACKED)
        row += first + tl.maximum(slot, 0) * h - first_key
    base = (batch * heads + group) * rows * D
    store_rows(grads_k + base, row, live, dk, D, BD)
    store_rows(grads_v + base, row, live, dv, D, BD)
