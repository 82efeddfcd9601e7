"""The segments of a level: which range of queries reads which range of keys, before either is sorted.

Shape letters: B batch, T queries, S keys, P segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents


@dataclass(frozen=True)
class Split:
    """Segments of one level; int64.

    Attributes:
        segments: [B, P, 4], (key_start, key_stop, query_start, query_stop) of each segment; unused ones are empty.
        segment: [B, T], segment of each query, or -1.
        is_key: bool [B, S], whether the position is a key of a segment.
        group: [B, S], number of the range that is sorted by itself; it increases with the position.
        draw_key: [B, P], number of the segment in its document: what its draws depend on, besides seed, level and head.
    """

    segments: Tensor
    segment: Tensor
    is_key: Tensor
    group: Tensor
    draw_key: Tensor


def split_documents(documents: Documents, queries: int, config: HyperAttentionConfig) -> Split:
    """One segment for each document longer than `exact_below`."""
    start, stop = documents.start, documents.stop
    B, S = start.shape
    if documents.single:
        segments = torch.tensor([[0, S, 0, queries]], device=start.device).expand(B, 1, 4)
        zero = torch.zeros_like(start)
        return Split(segments, zero[:, :1].expand(-1, queries), zero == 0, zero, zero[:, :1])
    position = torch.arange(S, device=start.device)
    is_key = documents.lengths() > config.exact_limit
    index, table = numbered(is_key & (position == start), S // (config.exact_limit + 1))
    begin, end = _at(start, table), _at(stop, table)
    segments = torch.stack([begin, end, begin, end], -1)
    group = (start != start.roll(1, 1)).long().cumsum(1)
    return Split(segments, torch.where(is_key, index, -1), is_key, group, torch.zeros_like(begin))


def split_causal(documents: Documents, half: int, offset: int, queries: int, config: HyperAttentionConfig) -> Split:
    """Odd tiles of `half` tokens read the even tile before them."""
    start, stop = documents.start, documents.stop
    S = start.shape[1]
    local = torch.arange(S, device=start.device) - start
    long = documents.lengths() > config.exact_limit
    odd, within = (local // half) % 2 == 1, local % half
    most = (S + half - 1) // (2 * half) if documents.single else S // (half + 1)
    index, table = numbered(long & odd & (within == 0), most)
    has_queries = start + (local // half + 1) * half < stop
    is_key = long & ~odd & has_queries
    begin = torch.where(table < S, table, 0)
    end = torch.where(table < S, torch.minimum(begin + half, _at(stop, table)), 0)
    bounds = [torch.where(table < S, begin - half, 0), begin, *((x - offset).clamp(min=0) for x in (begin, end))]
    # A tile that no later tile of its document reads is a group of its own and is not permuted.
    group = ((within == 0) | (local == 0)).long().cumsum(1)
    pair = torch.where(table < S, _at(local, table) // (2 * half), 0)
    return Split(torch.stack(bounds, -1), torch.where(long & odd, index, -1)[:, offset:], is_key, group, pair)


def numbered(first_BS: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Number the marked positions.

    Returns the number of the last mark at or before each position, [B, S], and the position of each mark, [B, most].
    """
    B, S = first_BS.shape
    index = first_BS.long().cumsum(1) - 1
    table = torch.full((B, most + 1), S, device=first_BS.device)
    position = torch.arange(S, device=first_BS.device).expand(B, -1)
    table.scatter_(1, torch.where(first_BS, index, most), torch.where(first_BS, position, S))
    return index, table[:, :most]


def _at(values_BS: Tensor, position_BP: Tensor) -> Tensor:
    """Values at positions; 0 at the position S, which means none."""
    S = values_BS.shape[1]
    return values_BS.gather(1, position_BP.clamp(max=S - 1)) * (position_BP < S)
