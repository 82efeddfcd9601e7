"""The parts of a plan as the kernels take them: what torch computes before a launch.

Shape letters: B batch, Hk key heads, T queries, S keys, P segments, M samples, D head size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hyper_attention.gpu.forward import Draws, pool_kernel
from kernels.hyper_attention.gpu.tiles import Hidden, Keys, Ranges, ranges, rows, table
from kernels.hyper_attention.gpu.tuning import padded
from kernels.hyper_attention.plan.pooling import log_counts
from kernels.hyper_attention.plan.tables import KeyPlan, Level, Lookback, Pooled


@dataclass(frozen=True)
class Part:
    """What one launch of the forward pass reads, and the way back.

    Attributes:
        name: "local", "level" or "lookback"; parts of one name are tuned together.
        near, sinks, pooled, draws: as in `forward_kernel`.
        readers: of each key slot, the query slots whose `near` range has it.
        query_order: int32 [B, Hq, T], position of each query slot; None: the slot itself.
        sink_readers: of each key, the queries whose sinks have it.
        level_draws: the draws as tensors.
        means: pooled keys and values, [B, Hk, P, D].
    """

    name: str
    near: Keys
    readers: Ranges
    sinks: Keys | None = None
    pooled: Keys | None = None
    draws: Draws | None = None
    query_order: Tensor | None = None
    sink_readers: Ranges | None = None
    level_draws: "LevelDraws | None" = None
    means: tuple[Tensor, Tensor] | None = None


def parts_of(k: Tensor, v: Tensor, plan: KeyPlan) -> list[Part]:
    """One part for each launch of the forward pass."""
    parts = [_local(k, v, plan), *(_level(k, v, level) for level in plan.levels)]
    return [*parts, *(_lookback(k, v, lookback) for lookback in plan.lookbacks)]


def _local(k: Tensor, v: Tensor, plan: KeyPlan) -> Part:
    """Band, sinks and pooled keys."""
    near = Keys(rows(k), rows(v), None, ranges(plan.band.start, plan.band.stop), None)
    sinks = sink_readers = pooled = means = None
    if plan.sinks is not None:
        sinks = near._replace(ranges=ranges(plan.sinks.start, plan.sinks.stop))
        sink_readers = ranges(*plan.sinks.readers)
    if plan.pooled is not None:
        means = pooled_means(k, v, plan.pooled)
        band = plan.pooled.band
        weight, hidden = table(log_counts(plan.pooled)), plan.pooled.hidden
        hides = None if hidden is None else Hidden(rows(hidden), tl.constexpr(hidden.shape[3]))
        pooled = Keys(rows(means[0]), rows(means[1]), None, ranges(band.start, band.stop), weight, hides)
    readers = ranges(*plan.band.readers)
    return Part("local", near, readers, sinks, pooled, sink_readers=sink_readers, means=means)


def _level(k: Tensor, v: Tensor, level: Level) -> Part:
    near = Keys(rows(k), rows(v), table(level.key_order), ranges(level.block.start, level.block.stop), None)
    readers = ranges(*level.block.readers)
    draws = level_draws(level)
    return Part(
        "level",
        near,
        readers,
        draws=kernel_draws(level, draws),
        query_order=level.query_order,
        level_draws=draws,
    )


@dataclass(frozen=True)
class LevelDraws:
    """The draws of a level by position; a draw has two: before the block for query slots from `split` on, else after.

    Attributes:
        place: int32 [B, Hk, 2, P * M], positions, those before the block first.
        slot: int64 [B, Hk, 2, P * M], key slots; S for draws that do not exist.
        start, stop: int32 [B, Hk, 2, P * M], query slots that read it; empty for draws that do not exist.
        split: int32 [B, Hk, P * M].
        log_weight: fp32 [B, 2, P * M].
    """

    place: Tensor
    slot: Tensor
    start: Tensor
    stop: Tensor
    split: Tensor
    log_weight: Tensor


def _lookback(k: Tensor, v: Tensor, lookback: Lookback) -> Part:
    near = Keys(rows(k), rows(v), table(lookback.key_order), ranges(lookback.band.start, lookback.band.stop), None)
    readers = ranges(*lookback.band.readers)
    return Part("lookback", near, readers, query_order=lookback.query_order)


def level_draws(level: Level) -> LevelDraws | None:
    """The draws of a level, if it has any."""
    S = level.key_order.shape[2]
    if level.sample_rank.numel() == 0:
        return None
    exists = (level.sample_log_weight > -torch.inf)[:, None, None]
    first_key, _, first_query, last_query = (x[:, None, :, None] for x in level.segments.unbind(-1))
    before = level.sample_rank + first_key
    slot = torch.stack([before, before + level.block_keys[:, None, :, None]], 2)
    slot = torch.where(exists, slot, S).flatten(3).long()
    split = level.sample_split
    start = torch.stack([split, first_query.expand_as(split)], 2).flatten(3)
    stop = torch.stack([last_query.expand_as(split), split], 2).flatten(3)
    place = level.key_order[:, :, None].expand(-1, -1, 2, -1).gather(3, slot.clamp(max=S - 1))
    weight = level.sample_log_weight.flatten(1)[:, None].expand(-1, 2, -1)
    return LevelDraws(
        place, slot, start, torch.where(exists.flatten(3), stop, start), split.flatten(2), weight.contiguous()
    )


def kernel_draws(level: Level, draws: LevelDraws | None) -> Draws | None:
    """The draws as the kernels that own queries take them."""
    if draws is None:
        return None
    before, after = (table(x) for x in draws.place.unbind(2))
    weight, count = table(draws.log_weight[:, 0]), level.sample_rank.shape[3]
    return Draws(table(level.query_segment), table(draws.split), before, after, weight, count)


def drawn_keys(k: Tensor, v: Tensor, draws: LevelDraws, groups: int) -> Keys:
    """The draws as keys of their own, 2 * P * M of them, with their readers, [B, Hq, ...]."""
    place = draws.place.flatten(2)
    start, stop = (x.flatten(2).repeat_interleave(groups, 1) for x in (draws.start, draws.stop))
    return Keys(rows(k), rows(v), table(place), ranges(start, stop), table(draws.log_weight.flatten(1)))


def row_of_slot(draws: LevelDraws, keys: int) -> Tensor:
    """For each key slot the number of its draw before, then after the block, or -1; int32 [B, Hk, 2 * S]."""
    B, heads, _, count = draws.slot.shape
    number = torch.arange(2 * count, dtype=torch.int32, device=draws.slot.device).view(2, count)
    row = torch.full((B, heads, 2, keys + 1), -1, dtype=torch.int32, device=draws.slot.device)
    return row.scatter_(3, draws.slot, number.expand_as(draws.slot))[..., :keys].flatten(2)


def segment_of_token(pooled: Pooled, keys: int) -> Tensor:
    """The pooled segment that each key is in the mean of, or -1 if none or if no query reads it; int32 [B, S]."""
    B, P = pooled.start.shape
    within = torch.arange(pooled.length, device=pooled.start.device)
    first, last = pooled.band.readers
    member = (within >= pooled.skip[..., None]) & (first < last)[..., None]
    token = torch.where(member, pooled.start[..., None].long() + within, keys)
    number = torch.arange(P, dtype=torch.int32, device=token.device)[:, None].expand_as(token)
    row = torch.full((B, keys + 1), -1, dtype=torch.int32, device=token.device)
    return row.scatter_(1, token.flatten(1), number.flatten(1))[:, :keys]


def pooled_means(k: Tensor, v: Tensor, pooled: Pooled) -> tuple[Tensor, Tensor]:
    """Mean keys and values of the segments, [B, Hk, P, D] in the dtype of k, summed in fp32."""
    B, heads, _, D = k.shape
    mean_k, mean_v = (k.new_empty(B, heads, pooled.start.shape[1], D) for _ in range(2))
    start, skip, size = table(pooled.start), table(pooled.skip), min(16, triton.next_power_of_2(pooled.length))
    for x, mean in ((k, mean_k), (v, mean_v)):
        grid = (pooled.start.shape[1] * heads, B)
        pool_kernel[grid](rows(x), rows(mean), start, skip, pooled.length, heads, D=D, BL=size, BD=padded(D))
    return mean_k, mean_v
