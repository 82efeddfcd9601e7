"""Look-back by means and by LSH on a GPU: the definition itself, a few rows at a time.

These two choices exist to compare the choice "nominated" with: exact in every detail, with memory linear in the number
of tokens, and as slow as exact attention without a flash kernel.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.hyper_attention.plan.pooling import add_pooled_gradient_, pool
from kernels.hyper_attention.plan.tables import Band, KeyPlan, Lookback
from kernels.hyper_attention.reference import all_log_weights, reference_attention

_ELEMENTS = 1 << 26  # of the logits of a piece


def forward(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output of the estimator and its log-sum-exp.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, D].
        plan: of mode "causal_local", for these shapes, on the device of q.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q and LSE [B, Hq, T], at least fp32. A query that reads no key has output 0
        and LSE -inf.
    """
    plan = _by_position(plan)
    parts = [reference_attention(q[:, :, rows], k, v, _rows_of(plan, rows), scale) for rows in _pieces(q, k)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: KeyPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the estimator, in the dtypes of q, k and v; arguments as of the other paths."""
    plan, wide = _by_position(plan), torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys, values = (_with_means(x.to(wide), plan) for x in (k, v))
    grad_q, grad_keys, grad_values = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _pieces(q, k):
        query, grad = q[:, :, rows].to(wide), grad_out[:, :, rows].to(wide)
        key, value = (x.repeat_interleave(groups, 1) for x in (keys, values))
        weight = all_log_weights(_rows_of(plan, rows), q.shape[1], k.shape[1]).to(wide)
        row_lse = lse[:, :, rows, None].masked_fill(lse[:, :, rows, None].isneginf(), 0.0)
        p = (scale * (query @ key.mT) + weight - row_lse).exp()
        delta = (grad * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, rows, None].to(wide)
        ds = scale * p * (grad @ value.mT - delta)
        grad_q[:, :, rows] = (ds @ key).to(q.dtype)
        for total, part in ((grad_keys, ds.mT @ query), (grad_values, p.mT @ grad)):
            total += part.view(len(part), -1, groups, *part.shape[2:]).sum(2)
    S = k.shape[2]
    grads = [x[:, :, :S].contiguous() for x in (grad_keys, grad_values)]
    if plan.pooled is not None:
        for total, part in zip(grads, (grad_keys, grad_values), strict=True):
            add_pooled_gradient_(total, part[:, :, S:], plan.pooled)
    return grad_q, grads[0].to(k.dtype), grads[1].to(v.dtype)


def _with_means(x: Tensor, plan: KeyPlan) -> Tensor:
    """Rows of the keys, then of their means, [B, Hk, S + P, D]."""
    return x if plan.pooled is None else torch.cat([x, pool(x, plan.pooled)], 2)


def _pieces(q: Tensor, k: Tensor) -> list[slice]:
    rows = max(1, _ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(first, min(first + rows, q.shape[2])) for first in range(0, q.shape[2], rows)]


def _by_position(plan: KeyPlan) -> KeyPlan:
    """The plan with the ranges of its look-backs in the order of queries, so that rows can be cut from it."""
    lookbacks = []
    for lookback in plan.lookbacks:
        order = lookback.query_order.long()
        start, stop = (torch.empty_like(x).scatter_(2, order, x) for x in (lookback.band.start, lookback.band.stop))
        lookbacks.append(replace(lookback, band=Band(start, stop, lookback.band.keys)))
    return replace(plan, lookbacks=tuple(lookbacks))


def _rows_of(plan: KeyPlan, rows: slice) -> KeyPlan:
    """The plan of some queries."""

    def cut(band: Band) -> Band:
        return Band(band.start[..., rows], band.stop[..., rows], band.keys)

    def own(lookback: Lookback) -> Lookback:
        order = torch.arange(rows.stop - rows.start, dtype=torch.int32, device=lookback.query_order.device)
        band = cut(lookback.band)
        return replace(lookback, query_order=order.expand(*band.start.shape[:2], -1), band=band)

    pooled = plan.pooled
    if pooled is not None:
        hidden = None if pooled.hidden is None else pooled.hidden[:, :, rows]
        pooled = replace(pooled, band=cut(pooled.band), hidden=hidden)
    sinks = None if plan.sinks is None else cut(plan.sinks)
    return KeyPlan(cut(plan.band), (), sinks, pooled, tuple(own(lookback) for lookback in plan.lookbacks))
