"""The plan of mode "paper" on a GPU: buckets, draws, and a stable counting sort of all levels, heads, queries and keys.

Sorting takes three launches: they count each bucket in each chunk of 1,024 tokens, find where a chunk's tokens of each
bucket begin, and write the places. A chunk is sorted by (bucket, token) in registers, so there are no atomics.
`plan.lsh` and `plan.tables` compute the same in torch.

Shape letters: B batch, H heads, T queries, S keys, D head size, L levels, R projections, M draws.
"""

import triton
import triton.language as tl

from kernels.hyper_attention.gpu.local.rows import load_rows
from kernels.hyper_attention.gpu.paper.ranges import height, locate, segment_at, slots_of, stratum

_GOLDEN = tl.constexpr(-7046029254386353131)
_FIRST = tl.constexpr(-4658895280553007687)
_SECOND = tl.constexpr(-7723592293110705685)


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as `plan.lsh._mix`."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _hash_tile(
    x, x_n, sides, buckets, row, count, stride,
    R: tl.constexpr, RP: tl.constexpr, LEVELS: tl.constexpr, LP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Buckets of BM rows at all levels, int16; `sides` holds the projections, [D, LP * RP], of SPLIT parts."""
    position = row + tl.arange(0, BM)
    rows = load_rows(x, x_n, position, position < count, True, D, BD)
    dimension = tl.arange(0, BD)
    bit = tl.arange(0, LP * RP)
    at = sides + dimension[:, None] * (LP * RP) + bit[None, :]
    within = (dimension < D)[:, None] & (bit >= 0)[None, :]
    if SPLIT:
        # The three parts of a projection together hold all its digits; their products with half precision are exact.
        side = tl.zeros([BM, LP * RP], tl.float32)
        for part in tl.static_range(3):
            piece = tl.load(at + part * D * LP * RP, mask=within, other=0.0)
            side = tl.dot(rows, piece.to(rows.dtype), side)
    else:
        side = tl.dot(rows, tl.load(at, mask=within, other=0.0), input_precision="tf32x3")
    sign = (side > 0).to(tl.int32)
    place = tl.arange(0, RP)
    value = tl.where(place < R, 1 << place, 0)
    word = tl.sum(tl.reshape(sign, [BM, LP, RP]) * value[None, None, :], 2)
    # The rank of the word in the Gray code: neighbouring buckets differ in one sign.
    word = word ^ (word >> 1)
    word = word ^ (word >> 2)
    word = word ^ (word >> 4)
    word = word ^ (word >> 8)
    level = tl.arange(0, LP)
    out = buckets + level.to(tl.int64)[None, :] * stride + position[:, None]
    tl.store(out, word.to(tl.int16), mask=(position < count)[:, None] & (level < LEVELS)[None, :])


@triton.jit(do_not_specialize=["T", "S", "exact_limit", "state"])
def hash_kernel(
    q, k, sides, query_buckets, key_buckets, ranks, starts, stops, q_b, q_h, q_n, k_b, k_h, k_n,
    heads, groups, T, S, exact_limit, segments, size, state,
    M: tl.constexpr, BD_M: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    LP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Buckets of queries and keys, int16 [L, B, H, N]; and the draws, int32 [B, Hk, segments, M], as ranks.

    Args:
        sides: projections, [Hk, 3 or 1, D, LP * RP].
        heads, groups: Hk, Hq / Hk.
        size: of a block.
        state: int64, of the random numbers, from seed and stream.
    """
    batch = tl.program_id(1).to(tl.int64)
    batches = tl.num_programs(1).to(tl.int64)
    index = tl.program_id(0)
    query_programs = (T + BM - 1) // BM * heads * groups
    key_programs = (S + BM - 1) // BM * heads
    parts: tl.constexpr = 3 if SPLIT else 1
    if index < query_programs:
        head = (index % (heads * groups)).to(tl.int64)
        row = index // (heads * groups) * BM
        of_head = sides + head // groups * parts * D * LP * RP
        base = (batch * heads * groups + head) * T
        _hash_tile(
            q + batch * q_b + head * q_h, q_n, of_head, query_buckets + base, row, T, batches * heads * groups * T,
            R, RP, LEVELS, LP, D, BD, BM, SPLIT,
        )  # fmt: skip
    elif index < query_programs + key_programs:
        group = ((index - query_programs) % heads).to(tl.int64)
        row = (index - query_programs) // heads * BM
        of_head = sides + group * parts * D * LP * RP
        base = (batch * heads + group) * S
        _hash_tile(
            k + batch * k_b + group * k_h, k_n, of_head, key_buckets + base, row, S, batches * heads * S,
            R, RP, LEVELS, LP, D, BD, BM, SPLIT,
        )  # fmt: skip
    else:
        index -= query_programs + key_programs
        group = (index % heads).to(tl.int64)
        number = index // heads
        level, h, slot, _, lower = locate(number, S, T, exact_limit, 1 << 30, 1, LEAF, LEVELS, FULL, PACKED)
        first_key, last_key, first_query, last_query, pair = segment_at(
            starts + batch * S, stops + batch * S, slot, h, T, S, exact_limit, FULL, PACKED
        )
        draw = tl.arange(0, BD_M)
        low, width = stratum(draw, last_key - first_key, size, last_query - first_query, M)
        word = _mix(state ^ (level.to(tl.int64) * _GOLDEN))
        word = _mix(word ^ (group * _GOLDEN))
        word = _mix(word ^ (pair.to(tl.int64) * _GOLDEN))
        words = _mix(word ^ (draw.to(tl.int64) * _GOLDEN))
        chance = (((words >> 11) & ((1 << 53) - 1)).to(tl.float64) + 0.5) * (1.0 / 9007199254740992.0)
        rank = low + (chance * width.to(tl.float64)).to(tl.int64)
        at = ranks + ((batch * heads + group) * segments + lower + slot) * M + draw
        tl.store(at, rank.to(tl.int32), mask=(draw < M) & (slot + draw * 0 >= 0))


@triton.jit
def _chunk(
    starts, stops, index, row, heads, groups, T, S, exact_limit,
    CHUNK: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(level, first token of the chunk, one past the last, first of its range, one past its last, heads that differ).

    Rows are those of the query heads, then those of the key heads: `row` decides between queries and keys.
    """
    level, h, slot, number, _ = locate(index, S, T, exact_limit, CHUNK, 1, LEAF, LEVELS, FULL, PACKED)
    first_key, last_key, first_query, last_query, _ = segment_at(
        starts, stops, slot, h, T, S, exact_limit, FULL, PACKED
    )
    is_query = row < heads * groups
    low = tl.where(is_query, first_query, first_key)
    high = tl.where(is_query, last_query, last_key)
    first = low + number * CHUNK
    return level, tl.minimum(first, high), tl.minimum(first + CHUNK, high), low, number


@triton.jit
def _side(query, key, batch, batches, level, row, heads, groups, T, S):
    """Pointer into `query` or `key`, [L, B, H, N], at the head of `row`; rows are query heads, then key heads."""
    if row < heads * groups:
        side = query + ((level.to(tl.int64) * batches + batch) * heads * groups + row) * T
    else:
        side = key + ((level.to(tl.int64) * batches + batch) * heads + row - heads * groups) * S
    return side


@triton.jit(do_not_specialize=["T", "S", "exact_limit", "chunks"])
def histogram_kernel(
    query_buckets, key_buckets, histogram, starts, stops, heads, groups, T, S, exact_limit, chunks,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """How many tokens of each chunk are in each bucket, int32 [B, Hq + Hk, chunks, BUCKETS]."""
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    row = tl.program_id(0) % (heads * groups + heads)
    index = tl.program_id(0) // (heads * groups + heads)
    level, first, last, _, _ = _chunk(
        starts + batch * S, stops + batch * S, index, row, heads, groups, T, S, exact_limit,
        CHUNK, LEAF, LEVELS, FULL, PACKED,
    )  # fmt: skip
    token = first + tl.arange(0, CHUNK)
    buckets = _side(query_buckets, key_buckets, batch, batches, level, row, heads, groups, T, S)
    # Tokens past the end of the range are counted in an extra bucket, which is not stored.
    bucket = tl.load(buckets + token, mask=token < last, other=BUCKETS).to(tl.int32)
    count = tl.histogram(bucket, 2 * BUCKETS)
    place = tl.arange(0, 2 * BUCKETS)
    at = histogram + ((batch * (heads * groups + heads) + row) * chunks + index) * BUCKETS + place
    tl.store(at, count, mask=place < BUCKETS)


@triton.jit(do_not_specialize=["T", "S", "exact_limit", "chunks"])
def offsets_kernel(
    histogram, heads, groups, T, S, exact_limit, chunks,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Turn counts into offsets, in place.

    The offset of a bucket in a chunk plus a token's rank in the sorted chunk is the token's place in its range.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) % (heads * groups + heads)
    index = tl.program_id(0) // (heads * groups + heads)
    level, h, slot, _, _ = locate(index, S, T, exact_limit, 1 << 30, 1, LEAF, LEVELS, FULL, PACKED)
    first = level * 0
    for i in tl.static_range(LEVELS):
        tokens = height(i, S, T, LEAF, FULL)
        per_slot = (tokens + CHUNK - 1) // CHUNK
        first += tl.where(i < level, slots_of(tokens, S, exact_limit, FULL, PACKED) * per_slot, 0)
    per_slot = (h + CHUNK - 1) // CHUNK
    first += slot * per_slot
    place = tl.arange(0, BUCKETS)
    at = histogram + ((batch * (heads * groups + heads) + row) * chunks + first) * BUCKETS + place
    total = tl.zeros([BUCKETS], tl.int32)
    for i in range(per_slot):
        total += tl.load(at + i * BUCKETS)
    offset = tl.cumsum(total, 0) - total
    for i in range(per_slot):
        count = tl.load(at + i * BUCKETS)
        tl.store(at + i * BUCKETS, offset - (tl.cumsum(count, 0) - count))
        offset += count


@triton.jit(do_not_specialize=["T", "S", "exact_limit", "chunks"])
def places_kernel(
    query_buckets, key_buckets, offsets, query_order, key_order, starts, stops,
    heads, groups, T, S, exact_limit, chunks,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Write the tokens of each range in the order of (bucket, token), int32 [L, B, H, N]."""
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    row = tl.program_id(0) % (heads * groups + heads)
    index = tl.program_id(0) // (heads * groups + heads)
    level, first, last, low, _ = _chunk(
        starts + batch * S, stops + batch * S, index, row, heads, groups, T, S, exact_limit,
        CHUNK, LEAF, LEVELS, FULL, PACKED,
    )  # fmt: skip
    within = tl.arange(0, CHUNK)
    buckets = _side(query_buckets, key_buckets, batch, batches, level, row, heads, groups, T, S)
    bucket = tl.load(buckets + first + within, mask=first + within < last, other=BUCKETS).to(tl.int32)
    ranked = tl.sort(bucket * CHUNK + within)
    bucket = ranked // CHUNK
    there = bucket < BUCKETS
    at = offsets + ((batch * (heads * groups + heads) + row) * chunks + index) * BUCKETS
    place = low + tl.load(at + bucket, mask=there, other=0) + within
    order = _side(query_order, key_order, batch, batches, level, row, heads, groups, T, S)
    tl.store(order + place, first + ranked % CHUNK, mask=there)
