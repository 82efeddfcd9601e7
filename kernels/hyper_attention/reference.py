"""The definition of the estimator in plain, dense PyTorch; every other path must agree with it.

Memory is T x S for each head: for tests and small inputs only.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, P segments, M samples.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.plan.pooling import log_counts, pool
from kernels.hyper_attention.plan.tables import Band, KeyPlan, Level, Lookback


def reference_attention(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in which the key j of query i counts exp(w_ij) times: softmax(scale * q k^T + w) v.

    w is 0 for exact keys, the log of the number of keys a sample stands for, and -inf for keys that are not read. The
    means of the plan's pooled segments are further keys, with the log of their counts.
    Differentiable by autograd in q, k and v; computed in the dtype of q, but at least in fp32.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, Dv].
        plan: for these shapes.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, Dv] in the dtype of q and log-sum-exp of the weighted logits [B, Hq, T], at least fp32. A
        query that reads no key has output 0 and log-sum-exp -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    key, value = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    log_weight = all_log_weights(plan, q.shape[1], k.shape[1])
    if plan.pooled is not None:
        key, value = (torch.cat([x, pool(x, plan.pooled)], 2) for x in (key, value))
    logits = scale * (q.to(wide) @ key.transpose(-1, -2)) + log_weight.to(wide)
    empty = log_weight.isneginf().all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    lse = logits.logsumexp(-1, keepdim=True)
    out = ((logits - lse).exp() @ value).masked_fill(empty, 0.0)
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf).squeeze(-1)


def all_log_weights(plan: KeyPlan, query_heads: int, key_heads: int) -> Tensor:
    """The weights w of `reference_attention`, fp32 [B, Hq, T, S + P]: of the keys, then of the means."""
    weights = log_weights(plan, query_heads, key_heads)
    return weights if plan.pooled is None else torch.cat([weights, _pooled(plan, query_heads)], -1)


def log_weights(plan: KeyPlan, query_heads: int, key_heads: int) -> Tensor:
    """The weights w of `reference_attention`, fp32 [B, Hq, T, S].

    Raises:
        RuntimeError: the plan lets a query read a key twice.
    """
    count, total = _band(plan.band, query_heads)
    if plan.sinks is not None:
        sinks = _band(plan.sinks, query_heads)
        count, total = count + sinks[0], total + sinks[1]
    for lookback in plan.lookbacks:
        found = _lookback(lookback, query_heads)
        count, total = count + found.int(), total + found.float()
    if plan.lists is not None:
        listed = _listed(plan, query_heads)
        count, total = count + listed.int(), total + listed.float()
    for level in plan.levels:
        for head in range(query_heads):
            key_head = head // (query_heads // key_heads)
            for batch in range(count.shape[0]):
                weight = _level(level, batch, head, key_head)
                total[batch, head] += weight
                count[batch, head] += (weight > 0).int()
    if int(count.max()) > 1:
        raise RuntimeError("hyper_attention: the plan lets a query read a key twice")
    return total.log()


def _pooled(plan: KeyPlan, query_heads: int) -> Tensor:
    """Log weights of the pooled keys, fp32 [B, Hq, T, P]."""
    pooled = plan.pooled
    assert pooled is not None  # noqa: S101 - for the type checker
    _, inside = _band(pooled.band, query_heads)
    if plan.lists is not None:
        inside = inside.masked_fill(_read_exactly(plan), 0.0)
    if pooled.hidden is not None:
        inside = torch.nn.functional.pad(inside, (0, 1)).scatter(3, pooled.hidden.long(), 0.0)[..., :-1]
    return inside.log() + log_counts(pooled)[:, None, None]


def _read_exactly(plan: KeyPlan) -> Tensor:
    """Whether the query reads the segment key by key, bool [B, Hq, T, P]."""
    assert plan.pooled is not None and plan.lists is not None  # noqa: S101, PT018 - for the type checker
    P, (T, S) = plan.pooled.start.shape[1], (plan.band.start.shape[1], plan.band.keys)
    listed = plan.lists.read(P, S - T).long()
    seen = torch.zeros(*listed.shape[:3], P + 1, dtype=torch.bool, device=listed.device)
    return seen.scatter_(3, listed, True)[..., :-1]


def _listed(plan: KeyPlan, query_heads: int) -> Tensor:
    """Whether the query reads the key in a segment of its tile's list, bool [B, Hq, T, S]; sinks are left out."""
    pooled = plan.pooled
    assert pooled is not None  # noqa: S101 - for the type checker
    segment = torch.full((pooled.start.shape[0], plan.band.keys), pooled.start.shape[1], device=pooled.start.device)
    within = torch.arange(pooled.length, device=segment.device)
    for batch, (starts, skips) in enumerate(zip(pooled.start.tolist(), pooled.skip.tolist(), strict=True)):
        for number, (start, skip) in enumerate(zip(starts, skips, strict=True)):
            if start or not number:
                segment[batch, start + within[skip:]] = number
    seen = torch.nn.functional.pad(_read_exactly(plan), (0, 1))
    index = segment[:, None, None].expand(-1, query_heads, seen.shape[2], -1)
    return seen.gather(3, index)


def _band(band: Band, query_heads: int) -> tuple[Tensor, Tensor]:
    """How often each query reads each key in the band, int32 and fp32 [B, Hq, T, S]."""
    key = torch.arange(band.keys, device=band.start.device)
    inside = (key >= band.start[..., None]) & (key < band.stop[..., None])
    inside = inside[:, None].expand(-1, query_heads, -1, -1)
    return inside.int().contiguous(), inside.float().contiguous()


def _lookback(lookback: Lookback, query_heads: int) -> Tensor:
    """Whether the query looks back to the key, bool [B, Hq, T, S] in positions."""
    key_order = lookback.key_order.long().repeat_interleave(query_heads // lookback.key_order.shape[1], dim=1)
    slot = torch.arange(key_order.shape[2], device=key_order.device)
    at_slots = (slot >= lookback.band.start[..., None]) & (slot < lookback.band.stop[..., None])
    at_keys = torch.zeros_like(at_slots).scatter_(3, key_order[:, :, None].expand_as(at_slots), at_slots)
    query = lookback.query_order.long()[..., None].expand_as(at_keys)
    return torch.zeros_like(at_keys).scatter_(2, query, at_keys)


def _level(level: Level, batch: int, head: int, key_head: int) -> Tensor:
    """How many keys each key stands for, for one head, fp32 [T, S] in positions; 0 where it is not read."""
    query_position = level.query_order[batch, head].long()
    key_position = level.key_order[batch, key_head].long()
    weight = torch.zeros(len(query_position), len(key_position), device=query_position.device)
    key_slot = torch.arange(len(key_position), device=query_position.device)
    for slot, position in enumerate(query_position.tolist()):
        segment = int(level.query_segment[batch, slot])
        if segment < 0:
            continue
        start, stop = level.block.start[batch, slot], level.block.stop[batch, slot]
        weight[position, key_position[(key_slot >= start) & (key_slot < stop)]] = 1
        rank = level.sample_rank[batch, key_head, segment]
        after_block = slot < level.sample_split[batch, key_head, segment]
        sample = level.segments[batch, segment, 0] + rank + level.block_keys[batch, segment] * after_block
        drawn = level.sample_log_weight[batch, segment] > -torch.inf
        weight[position, key_position[sample[drawn].long()]] += level.sample_log_weight[batch, segment][drawn].exp()
    return weight
