"""The choice of older segments that a query reads key by key: those whose mean keys have its largest logits.

The query would otherwise read the mean in place of the segment, and this approximation is worst where the mean has much
weight. Choosing costs as much as reading the means once, and finds keys that LSH rarely finds.

Shape letters: B batch, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head size, P segments, M chosen.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.plan.pooling import pool
from kernels.hyper_attention.plan.sorting import stable_order
from kernels.hyper_attention.plan.tables import Lookback, Pooled, band
from kernels.hyper_attention.threads import each_on

_ROWS = 256


def num_chosen(config: HyperAttentionConfig) -> int:
    """M, the largest number of segments that a query chooses; 0 if it chooses none."""
    if config.mode == "paper" or config.choice == "lsh" or not config.segment or not config.lookback:
        return 0
    return config.nominations if config.nominates else max(1, config.lookback // config.segment)


def choose_segments(q: Tensor, k: Tensor, pooled: Pooled, most: int) -> Tensor:
    """Segments that each query reads exactly, int32 [B, Hq, T, M], increasing in M; P stands for none.

    Computed in fp32, a few rows at a time, from segments that begin before them: later tokens change no product.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        pooled: the segments, and those that each query may choose from.
        most: M; a query that has fewer segments to choose from fills up with P.
    """
    (B, Hq, T, D), (Hk, S), P = q.shape, k.shape[1:3], pooled.start.shape[1]
    mean = pool(k.detach().float(), pooled).transpose(2, 3)
    chosen = torch.full((B, Hq, T, most), P, dtype=torch.int32, device=q.device)

    def choose(first: int) -> None:
        rows = slice(first, min(first + _ROWS, T))
        seen = min(P, (rows.stop + S - T) // pooled.length)
        if not seen:
            return
        query = q[:, :, rows].detach().float().reshape(B, Hk, -1, D)
        logit = (query @ mean[..., :seen]).view(B, Hq, -1, seen)
        segment = torch.arange(seen, device=q.device)
        start, stop = pooled.band.start[:, None, rows, None], pooled.band.stop[:, None, rows, None]
        logit = logit.masked_fill((segment < start) | (segment >= stop), -torch.inf)
        value, index = logit.topk(min(most, seen), dim=-1, sorted=False)
        index = torch.where(value > -torch.inf, index, P).sort(-1).values
        chosen[:, :, rows, : index.shape[-1]] = index.to(torch.int32)

    each_on(q.device, choose, range(0, T, _ROWS))
    return chosen


def read_chosen(chosen: Tensor, pooled: Pooled, k: Tensor) -> tuple[Lookback, ...]:
    """The chosen segments [B, Hq, T, M] as ranges of keys for each query, M or P of them; sinks are left out."""
    (B, Hq, _, M), (Hk, S) = chosen.shape, k.shape[1:3]
    key_order = torch.arange(S, dtype=torch.int32, device=k.device).expand(B, Hk, S).contiguous()
    # An extra segment after all keys, which is empty, stands for "none".
    first, stop = (
        torch.nn.functional.pad(x, (0, 1), value=S)[:, None].expand(B, Hq, -1)
        for x in (pooled.start + pooled.skip, pooled.start + pooled.length)
    )

    def read(number: int) -> Lookback:
        order = stable_order(chosen[..., number])
        segment = chosen[..., number].gather(2, order).long()
        keys = band(first.gather(2, segment), stop.gather(2, segment), S)
        return Lookback(order.to(torch.int32), key_order, keys, moves=False)

    return tuple(each_on(chosen.device, read, range(min(M, pooled.start.shape[1]))))
