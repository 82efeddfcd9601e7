"""The look-back: the newest keys of the query's own LSH bucket among those before its window.

Keys are sorted by (document, bucket, position), so what a query may look back to is a range of slots that ends where
its window begins: later tokens fill later slots of the bucket and change nothing.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents
from kernels.hyper_attention.plan.lsh import gray_buckets, projections
from kernels.hyper_attention.plan.sorting import stable_order
from kernels.hyper_attention.plan.tables import Lookback, band


def build_lookback(q: Tensor, k: Tensor, documents: Documents, older: Tensor, config: HyperAttentionConfig) -> Lookback:
    """Ranges of at most `config.lookback` sorted keys for each query.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        documents: of the key positions.
        older: int64 [B, T], tokens of the query's document before its window.
        config: sizes and seed.
    """
    (B, Hq, T, _), (Hk, S) = q.shape, k.shape[1:3]
    places = (1 << config.num_projections) + 1
    projection = projections(config.seed, 1, Hk, q.shape[3], config.num_projections, q.device)
    query_bucket, key_bucket = (gray_buckets(x, projection, 1)[0].long() + 1 for x in (q, k))
    begin = documents.start[:, None, S - T :]
    position = torch.arange(S, device=k.device)
    sink = position - documents.start < config.num_sinks
    # Every query already reads the sinks exactly, so they get a bucket of their own, to which no query hashes.
    key_group = documents.start[:, None] * places + torch.where(sink[:, None], 0, key_bucket)
    query_group = begin * places + query_bucket
    key_order = stable_order(key_group)
    query_order = stable_order(query_group)
    place = (key_group * S + position).gather(-1, key_order).contiguous()
    base = query_group.gather(-1, query_order) * S
    begin, older = (x.expand(B, Hq, T).gather(-1, query_order) for x in (begin, older[:, None]))
    bounds = torch.stack([base + begin, base + begin + older]).view(2, B, Hk, -1)
    first, stop = (torch.searchsorted(place, bound.contiguous(), out_int32=True).view(B, Hq, T) for bound in bounds)
    start = torch.maximum(first, stop - config.lookback)
    orders = (query_order.to(torch.int32), key_order.to(torch.int32))
    return Lookback(*orders, band(start, stop, S), moves=True)
