"""Look-back by nomination: each query names older segments, and a tile of queries reads what its rows have named.

A query nominates the segments whose mean keys have its largest logits, one or two. A row of a tile reads, key by key,
the segments that the rows of its tile up to itself, and all rows of the tile before, have nominated; it reads the other
older segments as their means. So the rows of a tile share one list, in the order in which its segments were first
nominated, and what a row reads depends on no later row.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, P segments, N slots of tiles,
C entries of a list, M nominations of a query.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents
from kernels.hyper_attention.plan.pooling import pool
from kernels.hyper_attention.plan.tables import KeyPlan, Pooled, band
from kernels.hyper_attention.plan.tiles import TileLists, Tiles, cut_tiles
from kernels.hyper_attention.threads import each_on

_ROWS = 256
_KEYS_TO_LOOKBACK = 6


def list_entries(config: HyperAttentionConfig) -> int:
    """C, the largest number of segments in a tile's list; 0 without look-back."""
    return max(1, _KEYS_TO_LOOKBACK * config.lookback // config.segment) if config.lookback else 0


def build_nominated_plan(
    q: Tensor, k: Tensor, documents: Documents, config: HyperAttentionConfig, nominated: Tensor | None = None
) -> KeyPlan:
    """KeyPlan of mode "causal_local" with choice "nominated"; documents of at most `exact_below` keys are all window.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        documents: of the key positions; more than one only if S == T.
        config: sizes.
        nominated: int32 [B, Hq, T, M], what `nominate` found for these queries and keys; None: it is called here.
    """
    queries, S, L = q.shape[2], k.shape[2], config.segment
    tiles = cut_tiles(documents, queries, config)
    begin, padding = documents.start[:, S - queries :], documents.padding()[:, S - queries :]
    position = torch.arange(S - queries, S, device=q.device)
    older = torch.where(tiles.slot < 0, 0, tiles.older.gather(1, tiles.slot.clamp(min=0)))
    window = band(begin + older, torch.where(padding, position, position + 1), S)
    sinks = band(begin, begin + older.clamp(max=config.num_sinks), S) if config.num_sinks else None
    if S < L:
        return KeyPlan(window, (), sinks)
    first = begin // L
    pooled = Pooled(band(first, first + older // L, S // L), *_segments(documents, config), L)
    entries = list_entries(config)
    if not entries:
        return KeyPlan(window, (), sinks, pooled)
    if nominated is None:
        nominated = nominate(q, k, pooled, config.nominations)
    lists = TileLists(tiles, *_lists(nominated, tiles, S - queries, pooled.start.shape[1], entries))
    return KeyPlan(window, (), sinks, pooled, (), lists, nominated)


def nominate(q: Tensor, k: Tensor, pooled: Pooled, count: int) -> Tensor:
    """The segments that each query nominates, int32 [B, Hq, T, M], best first, -1: none; the first of equal logits.

    Computed in fp32, a few rows at a time, from segments that begin before them: later tokens change no product.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        pooled: the segments, and those that each query may nominate.
        count: M.
    """
    (B, Hq, T, D), (Hk, S), P = q.shape, k.shape[1:3], pooled.start.shape[1]
    mean = pool(k.detach().float(), pooled).transpose(2, 3)
    nominated = torch.full((B, Hq, T, count), -1, dtype=torch.int32, device=q.device)

    def find(first: int) -> None:
        rows = slice(first, min(first + _ROWS, T))
        seen = min(P, -(-(rows.stop + S - T) // pooled.length))
        query = q[:, :, rows].detach().float().reshape(B, Hk, -1, D)
        logit = (query @ mean[..., :seen]).view(B, Hq, -1, seen)
        segment = torch.arange(seen, device=q.device)
        start, stop = pooled.band.start[:, None, rows, None], pooled.band.stop[:, None, rows, None]
        outside = (segment < start) | (segment >= stop)
        logit = logit.masked_fill_(outside, -torch.inf)
        for number in range(count):
            found = logit.argmax(-1, keepdim=True)
            some = logit.gather(-1, found) > -torch.inf
            nominated[:, :, rows, number] = torch.where(some, found, -1)[..., 0].to(torch.int32)
            logit.scatter_(-1, found, -torch.inf)

    each_on(q.device, find, range(0, T, _ROWS))
    return nominated


def _segments(documents: Documents, config: HyperAttentionConfig) -> tuple[Tensor, Tensor]:
    """First token of the whole segment that begins in [p L, p L + L), 0 if none, and its sinks; int32 [B, P] both.

    Segments are counted from the document's start. They begin L tokens apart, so no two begin in one such range, and a
    segment that begins in a range contains the range's last token.
    """
    L, S = config.segment, documents.start.shape[1]
    last = torch.arange(S // L, device=documents.start.device) * L + L - 1
    start, stop = documents.start[:, last], documents.stop[:, last]
    first = start + (last - start) // L * L
    first = torch.where((first + L <= stop) & (stop > start), first, 0)
    skip = (config.num_sinks - (first - documents.start.gather(1, first))).clamp(min=0)
    return first.to(torch.int32), skip.to(torch.int32)


def _lists(nominated: Tensor, tiles: Tiles, offset: int, segments: int, entries: int) -> tuple[Tensor, Tensor]:
    """Segment of each entry, P: none, and the first row of the tile that reads it; int32 [B, Hq, N, C] both.

    Args:
        nominated: int32 [B, Hq, T, M], -1: none.
        tiles: of these queries.
        offset: key position of query 0.
        segments: P.
        entries: C.
    """
    (B, Hq, T, M), size, device = nominated.shape, tiles.size, nominated.device
    row = torch.arange(size, device=device)
    before = torch.where(tiles.before < 0, 0, tiles.before)
    before_row = tiles.row.gather(1, before)
    names = []
    for first, stop, exists in (
        (tiles.row, tiles.stop, tiles.row < tiles.stop),
        (before_row, before_row + size, tiles.before >= 0),
    ):
        query = first[..., None] + row - offset
        there = exists[..., None] & (query >= 0) & (query < (stop - offset)[..., None])
        index = query.clamp(0, T - 1).flatten(1)[:, None, :, None].expand(B, Hq, -1, M)
        name = nominated.gather(2, index).view(B, Hq, -1, size, M)
        names.append(torch.where(there[:, None, ..., None] & (name >= 0), name, segments).flatten(-2))
    # Candidates are the nominations of the tile before, then those of the tile; a segment keeps its first only.
    candidates = torch.cat([names[1], names[0]], -1).long()
    wide = candidates.shape[-1]
    ranked = (candidates * wide + torch.arange(wide, device=device)).sort(-1).values
    name, place = ranked // wide, ranked % wide
    fresh = torch.ones_like(name, dtype=torch.bool)
    fresh[..., 1:] = name[..., 1:] != name[..., :-1]
    none = wide * (segments + 1)
    order = torch.where(fresh & (name < segments), place * (segments + 1) + name, none).sort(-1).values
    order = torch.nn.functional.pad(order, (0, max(0, entries - wide)), value=none)[..., :entries]
    # All rows read what the tile before nominated.
    first = (order // (segments + 1) // M - size).clamp(min=0)
    return (
        torch.where(order < none, order % (segments + 1), segments).to(torch.int32),
        torch.where(order < none, first, size).to(torch.int32),
    )
