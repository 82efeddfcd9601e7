"""Which query reads which key, and with which weight: every decision of the estimator, as tensors.

All paths (reference, CPU, Triton) read the same plan, forward and backward, and differ only in arithmetic. Nothing
here is differentiated. Without documents, or on a GPU, nothing is copied to the host.

A query's keys come from two places:

- the *band*: contiguous keys in their own order, exact;
- at each *level*, of one *segment* (a range of queries against a range of keys, each sorted by bucket): the block, a
  contiguous range of sorted keys, exact; and samples from the segment's other keys, with a weight.

Sorting permutes positions only within a segment's range, so that slot numbers and positions share one space: "slot" is
an index into `query_order` or `key_order`. Every table of a query is monotone in the slot, so the queries of a key are
a contiguous range too: dK and dV have one owner each, without atomics.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, M samples.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents
from kernels.hyper_attention.plan.lsh import SAMPLES, gray_buckets, projections, uniform
from kernels.hyper_attention.plan.segments import Split, split_causal, split_documents
from kernels.hyper_attention.plan.sorting import stable_order
from kernels.hyper_attention.plan.tiles import TileLists
from kernels.hyper_attention.threads import each_on


@dataclass(frozen=True)
class Band:
    """A contiguous range of keys for each query; int32, monotone in the last axis.

    Attributes:
        start: [..., T], first key of each query.
        stop: [..., T], one past its last.
        keys: S.
    """

    start: Tensor
    stop: Tensor
    keys: int

    @cached_property
    def readers(self) -> tuple[Tensor, Tensor]:
        """The first query that reads each key, and one past the last; int32 [..., S] both."""
        key = torch.arange(self.keys, device=self.start.device, dtype=torch.int32)
        key = key.expand(*self.start.shape[:-1], -1).contiguous()
        first = torch.searchsorted(self.stop, key, right=True, out_int32=True)
        last = torch.searchsorted(self.start, key, right=True, out_int32=True)
        return first, torch.maximum(first, last)


@dataclass(frozen=True)
class Level:
    """One level of the recursion: disjoint segments, each with its sort, its blocks and its samples.

    The sampled key of query slot t and draw m is slot `key_start + rank + (block_keys if t < split else 0)`: the draw
    is a rank among the keys outside the block, which is the same number of keys for all queries.

    Attributes:
        query_order: int32 [B, Hq, T], position of the query at each slot; the slot itself outside of segments.
        key_order: int32 [B, Hk, S], position of the key at each slot; the slot itself outside of segments.
        query_segment: int32 [B, T], the segment of each query slot, or -1.
        segments: int32 [B, P, 4], (key_start, key_stop, query_start, query_stop) of each segment, in slots; unused
            segments are empty. Increasing in P.
        sample_rank: int32 [B, Hk, P, M], increasing and without repetition in M.
        sample_log_weight: fp32 [B, P, M], log of the number of keys that the draw stands for; -inf: no draw.
        block_size: keys of a block, and query slots that share one, counted from each segment's first.
    """

    query_order: Tensor
    key_order: Tensor
    query_segment: Tensor
    segments: Tensor
    sample_rank: Tensor
    sample_log_weight: Tensor
    block_size: int

    @cached_property
    def block(self) -> Band:
        """Key slots of each query slot, [B, T]; none outside of segments."""
        slot = torch.arange(self.query_segment.shape[1], device=self.segments.device)
        segment = self.query_segment.long().clamp(min=0)
        bounds = tuple(bound.long().gather(1, segment) for bound in self.segments.unbind(-1))
        start = block_start(bounds, slot, self.block_size)
        stop = start + self.block_keys.long().gather(1, segment)
        member = self.query_segment >= 0
        stop = torch.where(member, stop, 0).cummax(1).values
        return band(torch.where(member, start, stop), stop, self.key_order.shape[2])

    @cached_property
    def block_keys(self) -> Tensor:
        """Keys in each block of the segment, int32 [B, P]: block_size, or all its keys."""
        return (self.segments[..., 1] - self.segments[..., 0]).clamp(max=self.block_size)

    @cached_property
    def sample_split(self) -> Tensor:
        """Query slot from which on the block lies after the sampled rank, int32 [B, Hk, P, M]."""
        first_key, _, first_query, last_query = (x[:, None, :, None] for x in self.segments.unbind(-1))
        slot = self.sample_rank + first_key
        past = torch.searchsorted(self.block.start, slot.flatten(1), right=True, out_int32=True)
        return past.view_as(slot).clamp(first_query, last_query)


@dataclass(frozen=True)
class Pooled:
    """Segments of keys; a query reads each as one key, the mean, with the log of the number of its keys as weight.

    Attributes:
        band: [B, T], segments of each query.
        start: int32 [B, P], first key of each segment; 0 if unused: the band of no query contains it.
        skip: int32 [B, P], keys at its beginning that its mean leaves out, less than `length`.
        length: L, keys of each segment.
        hidden: int32 [B, Hq, T, M], segments of its band that a query does not read as a mean; increasing, P: none.
    """

    band: Band
    start: Tensor
    skip: Tensor
    length: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Lookback:
    """Exact keys of the query's own bucket, an LSH bucket or a segment.

    Attributes:
        query_order: int32 [B, Hq, T], position of the query at each slot: by bucket, then position.
        key_order: int32 [B, Hk, S], position of the key at each slot, likewise.
        band: [B, Hq, T], key slots of each query slot.
        moves: whether the ranges of one bucket move with the window; else they are equal.
    """

    query_order: Tensor
    key_order: Tensor
    band: Band
    moves: bool


@dataclass(frozen=True)
class KeyPlan:
    """All parts of the softmax. Mode "paper" uses band and levels; mode "causal_local" uses all parts but the levels.

    Attributes:
        band: [B, T], exact keys by position.
        levels: sorted blocks and samples.
        sinks: more exact keys, before the band.
        pooled: means of keys before the band.
        lookbacks: more exact keys before the band, chosen by content; each gives a query one range.
        lists: more exact keys before the band: whole segments that the rows of a tile share.
        chosen: what the backward pass needs to make the same plan without choosing again; int32 [B, Hq, T, M].
    """

    band: Band
    levels: tuple[Level, ...]
    sinks: Band | None = None
    pooled: Pooled | None = None
    lookbacks: tuple[Lookback, ...] = ()
    lists: TileLists | None = None
    chosen: Tensor | None = None


def build_plan(
    q: Tensor,
    k: Tensor,
    causal: bool,
    documents: Documents,
    config: HyperAttentionConfig,
    buckets: tuple[Tensor, Tensor] | None = None,
) -> KeyPlan:
    """KeyPlan of mode "paper": Algorithms 1-4 of arXiv:2310.05869.

    Causal: the document is cut into tiles of `leaf` tokens, which are exact and causal (the band). At level l it is cut
    into tiles of h = leaf * 2**l tokens, and each odd tile reads the even tile before it through sortLSH and samples.
    This is Algorithm 4 with cuts at powers of two, so that key ranges are always full. Not causal: one level, with a
    segment for each document.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        causal: a query reads keys up to its own position only.
        documents: of the key positions; more than one only if S == T.
        config: sizes and seed.
        buckets: of queries and keys at all levels, as of `gray_buckets`; None: they are computed.
    """
    T, S = q.shape[2], k.shape[2]
    if causal:
        longest = S if documents.single or q.device.type != "cpu" else int(documents.lengths().max())
        levels = 0 if longest <= config.exact_limit else ((longest - 1) // config.leaf).bit_length()
    else:
        levels = int(config.exact_limit < S)
    exact = _exact(documents, T, causal, config)
    if not levels:
        return KeyPlan(exact, ())
    if buckets is None:
        projection = projections(config.seed, levels, k.shape[1], q.shape[3], config.num_projections, q.device)
        buckets = gray_buckets(q, projection, levels), gray_buckets(k, projection, levels)
    query_buckets, key_buckets = buckets
    offset = S - T if causal else 0

    def build_level(level: int) -> Level:
        if causal:
            split = split_causal(documents, config.leaf << level, offset, T, config)
        else:
            split = split_documents(documents, T, config)
        return _level(split, query_buckets[level], key_buckets[level], offset, level, config)

    return KeyPlan(exact, tuple(each_on(q.device, build_level, range(levels))))


def band(start: Tensor, stop: Tensor, keys: int) -> Band:
    """The band of the ranges [start, stop), integers [..., T], monotone, over `keys` keys."""
    return Band(start.to(torch.int32).contiguous(), stop.to(torch.int32).contiguous(), keys)


def block_start(bounds: tuple[Tensor, ...], slot: Tensor, size: int) -> Tensor:
    """First key slot of the block of each query slot (Algorithm 1), int64.

    Queries are taken in runs of `size` slots; each run reads `size` keys about its own relative rank.

    Args:
        bounds: key_start, key_stop, query_start, query_stop of the segment of each slot; int64, as `slot` or broadcast.
        slot: query slots.
        size: of a block.
    """
    key_start, key_stop, query_start, query_stop = bounds
    keys, count = key_stop - key_start, (query_stop - query_start).clamp(min=1)
    run = (slot - query_start) // size * size
    rows = (count - run).clamp(max=size)
    # Equal lengths and full runs give key_start + run: the diagonal blocks of the paper.
    low = torch.div((2 * run + rows) * keys - size * count, 2 * count, rounding_mode="floor")
    return key_start + torch.minimum(low.clamp(min=0), (keys - size).clamp(min=0))


def _exact(documents: Documents, queries: int, causal: bool, config: HyperAttentionConfig) -> Band:
    """Keys by position: those of short documents, and causally those of the query's own tile."""
    S = documents.start.shape[1]
    exact = documents.lengths() <= config.exact_limit
    if causal:
        position = torch.arange(S - queries, S, device=documents.start.device)
        begin, exact = documents.start[:, S - queries :], exact[:, S - queries :]
        start = torch.where(exact, begin, position - (position - begin) % config.leaf)
        stop = torch.where(documents.padding()[:, S - queries :], position, position + 1)
    elif documents.single:
        start = torch.zeros_like(documents.start[:, :1]).expand(-1, queries)
        stop = start + (S if config.exact_limit >= S else 0)
    else:
        start, stop = documents.start, torch.where(exact, documents.stop, documents.start)
    return band(start, stop, S)


def _level(
    split: Split, query_bucket: Tensor, key_bucket: Tensor, offset: int, level: int, config: HyperAttentionConfig
) -> Level:
    buckets = 1 << config.num_projections
    T, S = query_bucket.shape[2], key_bucket.shape[2]
    is_query = split.segment >= 0
    group_T = split.group[:, offset : offset + T] if T + offset == S else split.group[:, :1].expand(-1, T)
    query_order = _sorted(group_T, is_query, query_bucket, buckets)
    key_order = _sorted(split.group, split.is_key, key_bucket, buckets)
    rank, log_weight = _samples(split, key_bucket.shape[1], level, config)
    return Level(
        query_order=query_order,
        key_order=key_order,
        query_segment=split.segment.to(torch.int32).contiguous(),
        segments=split.segments.to(torch.int32).contiguous(),
        sample_rank=rank.to(torch.int32),
        sample_log_weight=log_weight,
        block_size=config.block_size,
    )


def _sorted(group_BT: Tensor, member_BT: Tensor, bucket_BHT: Tensor, buckets: int) -> Tensor:
    """Positions in the order of (group, bucket, position), int32 [B, H, T]; positions outside of segments stay."""
    key = (group_BT * buckets)[:, None] + torch.where(member_BT[:, None], bucket_BHT, 0)
    return stable_order(key).to(torch.int32)


def _samples(split: Split, heads: int, level: int, config: HyperAttentionConfig) -> tuple[Tensor, Tensor]:
    """One draw from each of M strata of the ranks outside the block (no rank twice), and its log size."""
    M = config.num_samples
    device = split.segments.device
    unseen = (split.segments[..., 1] - split.segments[..., 0] - config.block_size).clamp(min=0)[..., None]
    unseen = torch.where((split.segments[..., 3] > split.segments[..., 2])[..., None], unseen, 0)
    draw = torch.arange(M, device=device)
    low = draw * unseen // max(M, 1)
    size = (draw + 1) * unseen // max(M, 1) - low
    head = torch.arange(heads, device=device)[:, None, None]
    counters = (torch.full_like(head, level), head, split.draw_key[:, None, :, None], draw)
    chance = uniform(config.seed, SAMPLES, *counters)
    rank = low[:, None] + (chance * size[:, None]).long()
    return rank, size.float().log()
