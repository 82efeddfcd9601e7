"""Mode "paper" on a GPU: at most seven launches forward and seven backward, whatever lengths, heads and levels.

Forward: the bounds of documents and the check of their order (only if there are documents), buckets and draws, sorting
(three launches), all levels, the leaf. Backward: delta, dQ of the levels and of the leaf, draws, dK and dV of the
levels and of the leaf. The host reads nothing; every row of a result has one program that writes it.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, L levels, M draws, D head size.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.gpu.local.launches import document_bounds, on, unit_stride
from kernels.hyper_attention.gpu.local.query_gradients import delta_kernel
from kernels.hyper_attention.gpu.local.tiles import Tile, padded, tile_of
from kernels.hyper_attention.gpu.paper import leaf, level_keys, levels, order
from kernels.hyper_attention.gpu.paper.kept import Kept, Sizes, kept_bytes, sizes_of, views
from kernels.hyper_attention.plan.lsh import SAMPLES, initial_state, projections

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Call:
    """What the launches of a call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Sizes
    scale: float

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Strides along batch, head and row of each tensor."""
        return tuple(stride for x in tensors for stride in x.stride()[:3])

    @property
    def shape(self) -> dict[str, Any]:
        """What all kernels with levels are compiled for."""
        leaf = self.sizes.leaf if self.sizes.causal else 0
        return {"LEAF": leaf, "LEVELS": self.sizes.L, "FULL": not self.sizes.causal, "PACKED": self.sizes.packed}

    def tile(self, kernel: str) -> Tile:
        """Sizes of the kernel's tiles."""
        wide = self.q.dtype == torch.float32
        return tile_of(self.q.device, kernel, padded(self.sizes.D) * self.q.element_size(), wide)

    def constants(self, kernel: str, level: bool) -> dict[str, Any]:
        """What a large kernel is compiled for."""
        tile, D = self.tile(kernel), self.sizes.D
        precision = ("ieee" if torch.version.hip else "tf32x3") if self.q.dtype == torch.float32 else None
        more = {"SIZE": self.sizes.config.block_size, "M": self.sizes.M} if level else {}
        return more | self.shape | {
            "D": D, "BD": padded(D), "BM": tile.BM, "BN": tile.BN, "PRECISION": precision,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    config: HyperAttentionConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the estimator, its log-sum-exp, and what `backward` needs of the plan.

    Args:
        q: [B, Hq, T, D], fp16, bf16 or fp32, any strides.
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, D].
        document_ids: integers [B, T], not decreasing save for -1 on padding; None: each row is one document.
        causal: as in `hyper_attention`.
        config: sizes.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q; LSE [B, Hq, T], fp32; bytes as of `kept.views`.

    Raises:
        ValueError: the dtype is fp64.
    """
    call = call_of(q, k, v, causal, document_ids is not None, config, scale)
    s = call.sizes
    out = q.new_empty((s.B, s.Hq, s.T, s.D))
    lse = q.new_empty((s.B, s.Hq, s.T), dtype=torch.float32)
    buffer = torch.empty(kept_bytes(s), dtype=torch.uint8, device=q.device)
    kept = views(buffer, s)
    outs, lses = out, lse
    with on(q.device):
        if document_ids is not None:
            document_bounds(document_ids, kept.starts, kept.stops)
        if s.L:
            sort(call, kept, *buckets(call, kept))
            if not s.direct:
                outs = q.new_empty((s.B, s.Hq, s.rows(queries=True), s.D))
                lses = q.new_empty((s.B, s.Hq, s.rows(queries=True)), dtype=torch.float32)
            constants = call.constants("level", level=True)
            levels.level_kernel[_runs(s, constants) * s.Hq, s.B](
                call.q, call.k, call.v, kept.query_order, kept.key_order, kept.ranks, kept.starts, kept.stops, outs,
                lses, *call.strides(call.q, call.k, call.v), s.Hq, s.Hq // s.Hk, s.T, s.S,
                s.exact_limit, s.segments, s.rows(queries=True), scale * _LOG2E, FINAL=s.direct, **constants,
            )  # fmt: skip
        if not s.direct:
            constants = call.constants("leaf", level=False)
            leaf.leaf_kernel[triton.cdiv(s.T, constants["BM"]) * s.Hq, s.B](
                call.q, call.k, call.v, outs, lses, kept.starts, kept.stops, out, lse,
                *call.strides(call.q, call.k, call.v), s.Hq, s.Hq // s.Hk, s.T, s.S, s.exact_limit,
                s.rows(queries=True), scale * _LOG2E, **constants,
            )  # fmt: skip
    return out, lse, buffer


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    buffer: Tensor,
    packed: bool,
    causal: bool,
    config: HyperAttentionConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the estimator, in the dtypes of q, k and v.

    Args:
        grad_out: [B, Hq, T, D].
        grad_lse: [B, Hq, T] or None if the LSE was not used.
        q, k, v, causal, config, scale: as in `forward`.
        out, lse, buffer: what `forward` returned.
        packed: whether `forward` was given documents.
    """
    call = call_of(q, k, v, causal, packed, config, scale)
    s, kept = call.sizes, views(buffer, call.sizes)
    grad_out = unit_stride(grad_out)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    delta, lse_2 = (torch.empty((s.B, s.Hq, s.T), dtype=torch.float32, device=q.device) for _ in range(2))
    given = lse if grad_lse is None else grad_lse.contiguous()
    with on(q.device):
        delta_kernel[triton.cdiv(s.T, 64) * s.Hq, s.B](
            grad_out, out, given, lse, delta, lse_2, *call.strides(grad_out), s.Hq, s.T,
            D=s.D, BD=padded(s.D), BM=64, HAS_LSE=grad_lse is not None,
        )  # fmt: skip
        _query_gradient(call, kept, grad_out, lse_2, delta, grads[0])
        _key_gradients(call, kept, grad_out, lse_2, delta, grads[1], grads[2])
    return grads[0], grads[1], grads[2]


def buckets(call: Call, kept: Kept) -> tuple[Tensor, Tensor]:
    """Buckets of queries and keys, int16 [L, B, Hq, T] and [L, B, Hk, S]; also writes the draws to `kept`."""
    s, config, dtype = call.sizes, call.sizes.config, call.q.dtype
    query_buckets = torch.empty((s.L, s.B, s.Hq, s.T), dtype=torch.int16, device=call.q.device)
    key_buckets = torch.empty((s.L, s.B, s.Hk, s.S), dtype=torch.int16, device=call.q.device)
    bits, rows, split = config.num_projections, 64, dtype != torch.float32
    if not split:
        rows = 32 if call.q.device.type != "cpu" else 16
    places, levels_ = 8 if bits <= 8 else 16, max(2, triton.next_power_of_2(s.L))
    sides = _sides(config.seed, s.L, levels_, s.Hk, s.D, bits, places, dtype, call.q.device)
    programs = triton.cdiv(s.T, rows) * s.Hq + triton.cdiv(s.S, rows) * s.Hk + s.segments * s.Hk * (s.M > 0)
    order.hash_kernel[programs, s.B](
        call.q, call.k, sides, query_buckets, key_buckets, kept.ranks, kept.starts, kept.stops,
        *call.strides(call.q, call.k), s.Hk, s.Hq // s.Hk, s.T, s.S, s.exact_limit, s.segments,
        config.block_size, initial_state(config.seed, SAMPLES), M=max(s.M, 1), BD_M=triton.next_power_of_2(max(s.M, 1)),
        R=bits, RP=places, LP=levels_, D=s.D, BD=padded(s.D), BM=rows, SPLIT=split, **call.shape,
    )  # fmt: skip
    return query_buckets, key_buckets


def sort(call: Call, kept: Kept, query_buckets: Tensor, key_buckets: Tensor) -> None:
    """Write both orders: stable, by bucket, within each tile of each level."""
    s = call.sizes
    chunks, rows = s.programs(s.chunk), s.Hq + s.Hk
    histogram = torch.empty((s.B, rows, chunks, 1 << s.config.num_projections), dtype=torch.int32, device=call.q.device)
    heads = (s.Hk, s.Hq // s.Hk, s.T, s.S, s.exact_limit, chunks)
    constants: dict[str, Any] = {"BUCKETS": histogram.shape[3], "CHUNK": s.chunk, **call.shape}
    documents = (kept.starts, kept.stops)
    order.histogram_kernel[chunks * rows, s.B](
        query_buckets, key_buckets, histogram, *documents, *heads, **constants
    )  # fmt: skip
    order.offsets_kernel[s.segments * rows, s.B](histogram, *heads, **constants)
    order.places_kernel[chunks * rows, s.B](
        query_buckets, key_buckets, histogram, kept.query_order, kept.key_order, *documents, *heads, **constants
    )  # fmt: skip


def call_of(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, packed: bool, config: HyperAttentionConfig, scale: float
) -> Call:
    """The call's tensors with unit stride along D, and its sizes."""
    if q.dtype == torch.float64:
        raise ValueError("hyper_attention: q is torch.float64; on a GPU it must be fp16, bf16 or fp32")
    tensors = unit_stride(q), unit_stride(k), unit_stride(v)
    return Call(*tensors, sizes_of(q, k, causal, packed, config), scale)


def _runs(s: Sizes, constants: dict[str, Any]) -> int:
    """Programs that own a part of a run of queries."""
    return s.programs(s.config.block_size, triton.cdiv(s.config.block_size, constants["BM"]))


def _query_gradient(call: Call, kept: Kept, grad_out: Tensor, lse_2: Tensor, delta: Tensor, grad_q: Tensor) -> None:
    s, parts = call.sizes, grad_q
    strides = call.strides(call.q, call.k, call.v, grad_out)
    if s.L:
        parts = grad_q if s.direct else grad_q.new_empty((s.B, s.Hq, s.rows(queries=True), s.D))
        constants = call.constants("level_query_gradient", level=True)
        levels.level_query_gradient_kernel[_runs(s, constants) * s.Hq, s.B](
            call.q, call.k, call.v, grad_out, kept.query_order, kept.key_order, kept.ranks, kept.starts, kept.stops,
            lse_2, delta, parts, *strides, s.Hq, s.Hq // s.Hk, s.T, s.S, s.exact_limit, s.segments,
            s.rows(queries=True), call.scale * _LOG2E, **constants,
        )  # fmt: skip
    if not s.direct:
        constants = call.constants("leaf_query_gradient", level=False)
        leaf.leaf_query_gradient_kernel[triton.cdiv(s.T, constants["BM"]) * s.Hq, s.B](
            call.q, call.k, call.v, grad_out, parts, kept.starts, kept.stops, lse_2, delta, grad_q, *strides, s.Hq,
            s.Hq // s.Hk, s.T, s.S, s.exact_limit, s.rows(queries=True), call.scale * _LOG2E,
            **constants,
        )  # fmt: skip


def _key_gradients(
    call: Call, kept: Kept, grad_out: Tensor, lse_2: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    s, strides = call.sizes, call.strides(call.q, call.k, call.v, grad_out)
    tensors = (call.q, call.k, call.v, grad_out)
    parts = (grad_k, grad_v)
    if s.L:
        if not s.direct:
            shape = (s.B, s.Hk, s.rows(queries=False), s.D)
            parts = grad_k.new_empty(shape), grad_v.new_empty(shape)
        pieces = s.programs(s.piece)
        draws = grad_k.new_empty((2, s.B, s.Hk, pieces, 2, s.M, s.D))
        orders, documents = (kept.query_order, kept.key_order, kept.ranks), (kept.starts, kept.stops)
        numbers = (s.Hk, s.Hq // s.Hk, s.T, s.S, s.exact_limit, s.segments, pieces, s.rows(queries=False))
        if s.M:
            constants = call.constants("draw_gradient", level=True)
            programs = s.programs(s.piece, 2 * triton.cdiv(s.M, constants["BN"])) * s.Hk
            level_keys.draw_gradient_kernel[programs, s.B](
                *tensors, *orders, *documents, lse_2, delta, draws, *strides, *numbers, call.scale * _LOG2E,
                PIECE=s.piece, **constants
            )  # fmt: skip
        constants = call.constants("level_key_gradient", level=True)
        level_keys.level_key_gradient_kernel[s.programs(constants["BN"]) * s.Hk, s.B](
            *tensors, *orders, draws, *documents, lse_2, delta, *parts, *strides, *numbers, call.scale * _LOG2E,
            PIECE=s.piece, **constants
        )  # fmt: skip
    if not s.direct:
        constants = call.constants("leaf_key_gradient", level=False)
        leaf.leaf_key_gradient_kernel[triton.cdiv(s.S, constants["BN"]) * s.Hk, s.B](
            *tensors, *parts, kept.starts, kept.stops, lse_2, delta, grad_k, grad_v, *strides, s.Hk, s.Hq // s.Hk,
            s.T, s.S, s.exact_limit, s.rows(queries=False), call.scale * _LOG2E, **constants,
        )  # fmt: skip


@lru_cache(maxsize=32)
def _sides(
    seed: int,
    levels_: int,
    padded_levels: int,
    heads: int,
    D: int,
    bits: int,
    places: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Projections as `hash_kernel` takes them, [Hk, parts, D, padded levels * places]; made once."""
    sides = projections(seed, levels_, heads, D, bits, device).view(heads, D, levels_, bits)
    sides = torch.nn.functional.pad(sides, (0, places - bits, 0, padded_levels - levels_)).flatten(2)
    if dtype == torch.float32:
        return sides[:, None].contiguous()
    parts = []
    for _ in range(3):
        part = sides.to(dtype)
        parts.append(part)
        sides = sides - part.float()
    return torch.stack(parts, 1)
