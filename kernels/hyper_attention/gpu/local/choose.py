"""The plan on a GPU: means of segments, the segment that each query nominates, the lists of tiles and their inverse.

Each kernel is one launch for all heads and documents; nothing is sorted or read by the host. `plan.nominate` is the
same in torch.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, N slots of tiles, C entries of a
list, L tokens of a segment, D head size.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.rows import load_rows, store_rows, tile_at

_FAR = tl.constexpr(1 << 30)
UNREAD = tl.constexpr(255)


@triton.jit(do_not_specialize=["S", "P", "sinks"])
def pool_kernel(
    k, v, mean_k, mean_v, starts, stops, k_b, k_h, k_n, v_b, v_h, v_n, heads, S, P, sinks,
    L: tl.constexpr, BL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Mean key and value of each whole segment without its sinks, [B, Hk, P, D]; summed in fp32."""
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    segment = tl.program_id(0) // heads
    first, document = segment * L, S * 0
    if PACKED:
        last = segment * L + L - 1
        document = tl.load(starts + batch * S + last)
        end = tl.load(stops + batch * S + last)
        first = document + (last - document) // L * L
        first = tl.where((first + L <= end) & (end > document), first, 0)
    skip = tl.maximum(sinks - (first - document), 0)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    total_k = tl.zeros([BD], tl.float32)
    total_v = tl.zeros([BD], tl.float32)
    for i in range(0, L, BL):
        within = i + tl.arange(0, BL)
        inside = within >= skip
        total_k += tl.sum(load_rows(k, k_n, first + within, inside, True, D, BD).to(tl.float32), 0)
        total_v += tl.sum(load_rows(v, v_n, first + within, inside, True, D, BD).to(tl.float32), 0)
    row = segment + tl.zeros([1], tl.int32)
    share = 1.0 / (L - skip)
    base = (batch * heads + head) * P * D
    store_rows(mean_k + base, row, row >= 0, (total_k * share)[None, :], D, BD)
    store_rows(mean_v + base, row, row >= 0, (total_v * share)[None, :], D, BD)


@triton.jit(do_not_specialize=["T", "S", "P", "first_block", "exact_limit", "window"])
def nominate_kernel(
    q, mean_k, nominated, starts, stops, q_b, q_h, q_n, heads, groups, T, S, P, first_block, exact_limit, window,
    L: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Number of the older segment whose mean key has the largest logit, int32 [B, Hq, T], -1: none; ties: the first."""
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    index = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    part = index % (TILE // BM)
    slot = index // (TILE // BM)
    starts += batch * S
    stops += batch * S
    kind = slot * 0
    if PACKED:
        kind = slot % 3
        slot = slot // 3 * 2 + tl.minimum(kind, 1)
    row, stop, start, _ = tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED, TILE)
    older = tl.maximum(row - start - window, 0) // L * L
    position = row + part * BM + tl.arange(0, BM)
    live = position < stop
    if PACKED:
        if kind == 2:
            position = (first_block + slot // 2) * TILE + part * BM + tl.arange(0, BM)
            begin = tl.load(starts + position, mask=position < S, other=0)
            end = tl.load(stops + position, mask=position < S, other=0)
            live = (position < S) & (end - begin <= exact_limit)
            older = older * 0
    query = position - (S - T)
    live = live & (query >= 0)
    count = older // L
    rows = load_rows(q + batch * q_b + head * q_h, q_n, query, live, True, D, BD)
    mean_k += ((batch * (heads // groups) + head // groups) * P + start // L) * D
    best = tl.full([BM], float("-inf"), tl.float32)
    name = tl.full([BM], -1, tl.int32)
    for j in range(0, count, BN):
        column = j + tl.arange(0, BN)
        key = load_rows(mean_k, D, column, column < count, True, D, BD)
        logits = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        logits = tl.where((column < count)[None, :], logits, float("-inf"))
        top = tl.max(logits, 1)
        place = tl.min(tl.where(logits == top[:, None], column[None, :], _FAR), 1)
        name = tl.where(top > best, start // L + place, name)
        best = tl.maximum(best, top)
    tl.store(nominated + (batch * heads + head) * T + query, name, mask=live)


@triton.jit(do_not_specialize=["T", "S", "P", "N", "first_block", "exact_limit"])
def lists_kernel(
    nominated, listed, firsts, counts, first_of, starts, stops, heads, T, S, P, N, first_block, exact_limit,
    C: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The list of each tile, and its inverse by tile and segment.

    Args:
        nominated: int32 [B, Hq, T].
        listed, firsts: int32 [B, Hq, N, C], segment of each entry and first row that reads it.
        counts: int32 [B, Hq, N], entries.
        first_of: uint8 [B, Hq, N, P], first row that reads the segment, UNREAD: none does.
    """
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads
    starts += batch * S
    stops += batch * S
    row, stop, start, _ = tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED, TILE)
    nominated += (batch * heads + head) * T
    low = tl.maximum(tl.maximum(start, row - TILE), S - T)
    stop = tl.where(row < stop, stop, low)
    # Candidate i is what token row - TILE + i nominated; those of the tile before count from the first row on.
    own = tl.arange(0, 2 * TILE)
    token = row - TILE + own
    there = (token >= low) & (token < stop)
    name = tl.load(nominated + token - (S - T), mask=there, other=-1)
    since = tl.maximum(own - TILE, 0)
    name = tl.where(name >= 0, name, _FAR)
    again = own < 0
    for other in range(0, 2 * TILE, BR):
        index = other + tl.arange(0, BR)
        at = row - TILE + index
        rival = tl.load(nominated + at - (S - T), mask=(at >= low) & (at < stop), other=-1)
        same = (rival[None, :] == name[:, None]) & (index[None, :] < own[:, None])
        again = again | (tl.max(same.to(tl.int32), 1) > 0)
    kept = ((name < _FAR) & (again == 0)).to(tl.int32)
    rank = tl.cumsum(kept, 0) - kept
    kept = (kept > 0) & (rank < C)
    base = (batch * heads + head) * N + slot
    tl.store(listed + base * C + rank, name, mask=kept)
    tl.store(firsts + base * C + rank, since, mask=kept)
    tl.store(counts + base, tl.sum(kept.to(tl.int32), 0))
    place = tl.arange(0, BC)
    at_place = kept[:, None] & (rank[:, None] == place[None, :])
    entry_name = tl.min(tl.where(at_place, name[:, None], _FAR), 0)
    entry_since = tl.min(tl.where(at_place, since[:, None], UNREAD), 0)
    for segment in range(0, P, BP):
        column = segment + tl.arange(0, BP)
        found = tl.where(column[:, None] == entry_name[None, :], entry_since[None, :], UNREAD)
        tl.store(first_of + base * P + column, tl.min(found, 1).to(tl.uint8), mask=column < P)


@triton.jit(do_not_specialize=["S", "P", "N", "first_block", "exact_limit"])
def invert_kernel(
    first_of, readers, reader_counts, starts, stops, heads, S, P, N, first_block, exact_limit,
    BT: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The tiles that list each segment, by position.

    Args:
        first_of: uint8 [B, Hq, N, P].
        readers: int32 [B, Hq, P, N], first position of the tile * 256 + first row that reads the segment.
        reader_counts: int32 [B, Hq, P], how many there are.
    """
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    column = tl.program_id(0) // heads * BP + tl.arange(0, BP)
    starts += batch * S
    stops += batch * S
    base = batch * heads + head
    found = tl.zeros([BP], tl.int32)
    for first in range(0, N, BT):
        slot = first + tl.arange(0, BT)
        row, _, _, _ = tile_at(starts, stops, tl.minimum(slot, N - 1), first_block, S, exact_limit, PACKED, TILE)
        inside = (slot < N)[:, None] & (column < P)[None, :]
        since = tl.load(first_of + (base * N + slot[:, None]) * P + column[None, :], mask=inside, other=UNREAD)
        since = since.to(tl.int32)
        hit = since < UNREAD
        place = found[None, :] + tl.cumsum(hit.to(tl.int32), 0) - 1
        at = readers + (base * P + column[None, :]) * N + place
        tl.store(at, row[:, None] * 256 + since, mask=hit)
        found += tl.sum(hit.to(tl.int32), 0)
    tl.store(reader_counts + base * P + column, found, mask=column < P)
