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
# More than there can be segments: a call has at most 2**23 keys, a segment at least 16.
_NAMES = tl.constexpr(1 << 20)


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
    PACKED: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numbers of the M older segments whose mean keys have the largest logits, int32 [B, Hq, T, M]; -1: none.

    M is 1 or 2; of equal logits the first segment.
    """
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
    next_best = best
    next_name = name
    for j in range(0, count, BN):
        column = j + tl.arange(0, BN)
        key = load_rows(mean_k, D, column, column < count, True, D, BD)
        logits = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        logits = tl.where((column < count)[None, :], logits, float("-inf"))
        top, place = _largest(logits, column)
        beats = top > best
        if M == 2:
            second, second_place = _largest(tl.where(column[None, :] == place[:, None], float("-inf"), logits), column)
            # The second is the loser of the first place or the winning side's own second; of equal ones the older.
            lost, lost_name = tl.where(beats, best, top), tl.where(beats, name, start // L + place)
            rival = tl.where(beats, second, next_best)
            rival_name = tl.where(beats, start // L + second_place, next_name)
            wins = tl.where(beats, rival > lost, rival >= lost)
            next_best, next_name = tl.where(wins, rival, lost), tl.where(wins, rival_name, lost_name)
        name = tl.where(beats, start // L + place, name)
        best = tl.maximum(best, top)
    at = nominated + ((batch * heads + head) * T + query) * M
    tl.store(at, name, mask=live)
    if M == 2:
        tl.store(at + 1, next_name, mask=live)


@triton.jit
def _largest(logits, column):
    """The largest logit of each row, and its first column."""
    top = tl.max(logits, 1)
    return top, tl.min(tl.where(logits == top[:, None], column[None, :], _FAR), 1)


@triton.jit(do_not_specialize=["T", "S", "P", "N", "first_block", "exact_limit"])
def lists_kernel(
    nominated, listed, firsts, counts, first_of, starts, stops, heads, T, S, P, N, first_block, exact_limit,
    C: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The list of each tile, and its inverse by tile and segment.

    Args:
        nominated: int32 [B, Hq, T, M].
        listed, firsts: int32 [B, Hq, N, C], segment of each entry and first row that reads it.
        counts: int32 [B, Hq, N], entries.
        first_of: uint8 [B, Hq, N, P], first row that reads the segment, UNREAD: none does.
    """
    batch, head = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads
    starts += batch * S
    stops += batch * S
    row, stop, start, _ = tile_at(starts, stops, slot, first_block, S, exact_limit, PACKED, TILE)
    low = tl.maximum(tl.maximum(start, row - TILE), S - T)
    stop = tl.where(row < stop, stop, low)
    base = (batch * heads + head) * N + slot
    WIDE: tl.constexpr = 2 * TILE * M
    own = tl.arange(0, WIDE)
    for segment in range(0, P, WIDE):
        tl.store(first_of + base * P + segment + own, tl.full([WIDE], UNREAD, tl.uint8), mask=segment + own < P)
    # Candidates are the nominations of tokens from row - TILE on. All rows read those of the tile before.
    token = row - TILE + own // M
    there = (token >= low) & (token < stop)
    name = tl.load(nominated + ((batch * heads + head) * T + token - (S - T)) * M + own % M, mask=there, other=-1)
    # Keep each segment once, at its first nomination: sort by segment, then by place.
    by_name = tl.sort(tl.where(name >= 0, name * WIDE + own, _FAR))
    before = tl.gather(by_name, tl.maximum(own - 1, 0), 0)
    fresh = (by_name < _FAR) & ((own == 0) | (before // WIDE != by_name // WIDE))
    by_place = tl.sort(tl.where(fresh, by_name % WIDE * _NAMES + by_name // WIDE, _FAR))
    entries = tl.minimum(tl.sum(fresh.to(tl.int32), 0), C)
    segment = by_place % _NAMES
    since = tl.maximum(by_place // _NAMES // M - TILE, 0)
    kept = own < entries
    tl.store(listed + base * C + own, segment, mask=kept)
    tl.store(firsts + base * C + own, since, mask=kept)
    tl.store(counts + base, entries)
    tl.debug_barrier()  # after all have written UNREAD
    tl.store(first_of + base * P + segment, since.to(tl.uint8), mask=kept)


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
