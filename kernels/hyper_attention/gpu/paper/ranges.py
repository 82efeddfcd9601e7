"""Where the segments of mode "paper" lie, by arithmetic and without a table; `plan.segments` is the same in torch.

Causal: at level l a document is cut into tiles of h = leaf * 2**l tokens, and each odd tile reads the even tile before
it. Slot p of a level stands for the odd tile that begins in [p h, p h + h); such tiles are 2 h apart in a document and
more than h apart across documents, so no two share a slot, and token p h lies in the document of the tile. Without
documents only the odd tiles have slots. Otherwise (FULL) a level has one segment for each long document.

Shape letters: T queries, S keys.
"""

import triton
import triton.language as tl


@triton.jit
def height(level, S, T, LEAF: tl.constexpr, FULL: tl.constexpr):
    """h, the tokens of a level's tile; without a mask, the larger of T and S."""
    if FULL:
        return tl.maximum(S, T)
    else:
        return LEAF << level


@triton.jit
def slots_of(h, S, exact_limit, FULL: tl.constexpr, PACKED: tl.constexpr):
    """Slots of the level whose tiles have h tokens."""
    if FULL:
        if PACKED:
            return (S + exact_limit) // (exact_limit + 1)
        else:
            return S * 0 + 1
    else:
        if PACKED:
            return (S + h - 1) // h
        else:
            return (S + h - 1) // h // 2


@triton.jit
def locate(
    index, S, T, exact_limit, unit,
    PER_UNIT: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(level, h, slot, number within the slot, slots of lower levels) of a program.

    A slot has PER_UNIT programs for each `unit` tokens of its tile. Programs past the last have the slot -1.
    """
    level = index * 0
    slot = index * 0 - 1
    number = index * 0
    lower = index * 0
    tokens = index * 0 + height(0, S, T, LEAF, FULL)
    left = index
    passed = index * 0
    for i in tl.static_range(LEVELS):
        h = height(i, S, T, LEAF, FULL)
        slots = slots_of(h, S, exact_limit, FULL, PACKED)
        programs = (h + unit - 1) // unit * PER_UNIT
        here = (left >= 0) & (left < slots * programs)
        level = tl.where(here, i, level)
        slot = tl.where(here, left // programs, slot)
        number = tl.where(here, left % programs, number)
        lower = tl.where(here, passed, lower)
        tokens = tl.where(here, h, tokens)
        left = tl.where(left >= 0, left - slots * programs, left)
        passed += slots
    return level, tokens, slot, number, lower


@triton.jit
def segment_at(starts, stops, slot, h, T, S, exact_limit, FULL: tl.constexpr, PACKED: tl.constexpr):
    """(first key, one past the last, first query, one past the last, number in the document) of a slot.

    Keys are positions, queries are numbers of queries; an empty slot has neither.
    """
    if FULL:
        if PACKED:
            width = exact_limit + 1
            at = tl.minimum(tl.maximum(slot, 0) * width + exact_limit, S - 1)
            start = tl.load(starts + at)
            end = tl.load(stops + at)
            there = (slot >= 0) & (end - start > exact_limit) & (start // width == slot)
            first_key = start
            last_key = tl.where(there, end, start)
            first_query = start
            last_query = last_key
        else:
            there = slot >= 0
            first_key = slot * 0
            last_key = tl.where(there, S, first_key)
            first_query = slot * 0
            last_query = tl.where(there, T, first_query)
        number = slot * 0
    else:
        start = slot * 0
        end = start + S
        if PACKED:
            edge = tl.maximum(slot, 0) * h
            start = tl.load(starts + tl.minimum(edge, S - 1))
            end = tl.load(stops + tl.minimum(edge, S - 1))
            tile = (tl.maximum(edge - start, 0) + h - 1) // h
        else:
            tile = 2 * slot + 1
        middle = start + tile * h
        there = (slot >= 0) & (end - start > exact_limit) & (tile % 2 == 1) & (middle < end)
        first_key = tl.where(there, middle - h, 0)
        last_key = tl.where(there, middle, 0)
        first_query = tl.where(there, tl.maximum(middle - (S - T), 0), 0)
        last_query = tl.where(there, tl.maximum(tl.minimum(middle + h, end) - (S - T), 0), 0)
        number = tile // 2
    return first_key, last_key, first_query, last_query, number


@triton.jit
def rows_before(
    level, S, exact_limit, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr
):
    """First row of a level in the tensors that hold a row for each token of each slot; without a mask there is one."""
    rows = level * 0
    if FULL == 0:
        for i in tl.static_range(LEVELS):
            rows += tl.where(i < level, slots_of(LEAF << i, S, exact_limit, FULL, PACKED) * (LEAF << i), 0)
    return rows


@triton.jit
def row_of(position, start, first, h, IS_KEY: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr):
    """Row of a token in the level whose tiles have h tokens and whose first row is `first`.

    The token is a query of an odd tile or a key of an even tile, in the document that begins at `start`.
    """
    if FULL:
        row = position
    else:
        tile = (position - start) // h
        if PACKED:
            slot = (start + (tile + (1 if IS_KEY else 0)) * h) // h
        else:
            slot = tile // 2
        row = first + slot * h + position - start - tile * h
    return row


@triton.jit
def block_start(run, keys, count, size):
    """First key of the block that a run of `size` queries reads, counted from the segment's first (Algorithm 1)."""
    first = run * size
    rows = tl.minimum(count - first, size)
    if keys == count:
        # Most segments have as many keys as queries: no division of 64 bits.
        low = tl.maximum(first - (size - rows + 1) // 2, 0)
    else:
        queries = tl.maximum(count, 1).to(tl.int64)
        middle = (2 * first.to(tl.int64) + rows) * keys - size * queries
        low = (tl.maximum(middle, 0) // (2 * queries)).to(tl.int32)
    return tl.minimum(low, tl.maximum(keys - size, 0))


@triton.jit
def first_runs(beyond, keys, count, size):
    """The first run whose block begins after key `beyond` [N] of the segment, [N]; the number of runs if none does."""
    runs = (count + size - 1) // size
    # A guess from the ratio of queries to keys, then exact.
    share = beyond.to(tl.float32) * (count.to(tl.float32) / tl.maximum(keys, 1).to(tl.float32))
    guess = tl.minimum(tl.maximum(share.to(tl.int32), 0) // size + (beyond >= 0).to(tl.int32), runs)
    late = ((guess > 0) & (block_start(guess - 1, keys, count, size) > beyond)).to(tl.int32)
    while tl.max(late, 0) > 0:
        guess -= late
        late = ((guess > 0) & (block_start(guess - 1, keys, count, size) > beyond)).to(tl.int32)
    early = ((guess < runs) & (block_start(guess, keys, count, size) <= beyond)).to(tl.int32)
    while tl.max(early, 0) > 0:
        guess += early
        early = ((guess < runs) & (block_start(guess, keys, count, size) <= beyond)).to(tl.int32)
    return guess


@triton.jit
def stratum(draw, keys, size, count, M: tl.constexpr):
    """(first rank, ranks) of a draw's stratum among the keys outside the block; none where there are no queries."""
    unseen = tl.where(count > 0, tl.maximum(keys - size, 0), 0).to(tl.int64)
    low = draw * unseen // M
    return low, (draw + 1) * unseen // M - low
