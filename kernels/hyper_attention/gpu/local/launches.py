"""Mode "causal_local" with choice "nominated" on a GPU: at most six launches forward and six backward, at any size.

Forward: the bounds of documents and the check of their order (only if there are documents), means, nominations, lists,
attention. Backward: delta, the lists' inverse, dQ, gradients of means and their sum, dK and dV. The host reads nothing;
every row of a result has one program that writes it, so equal inputs give equal bits.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, P segments, N slots of tiles, C entries of a
list, D head size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.gpu.local import choose, key_gradients, query_gradients
from kernels.hyper_attention.gpu.local.forward import attend_kernel
from kernels.hyper_attention.gpu.local.kept import Kept, Sizes, kept_bytes, sizes_of, views
from kernels.hyper_attention.gpu.local.rows import documents_kernel
from kernels.hyper_attention.gpu.local.tiles import Tile, padded, tile_of
from kernels.hyper_attention.plan import tiles as plan_tiles

_LOG2E = 1.4426950408889634
_MOST_KEYS = 1 << 23  # a position and a row of a tile are packed into 31 bits
_PROGRAMS = 1024
_DOCUMENT_ROWS = 4096


@dataclass(frozen=True)
class _Call:
    """What the launches of a call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Sizes
    scale: float

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Strides along batch, head and row of each tensor."""
        return tuple(stride for x in tensors for stride in x.stride()[:3])

    def constants(self, tile: Tile) -> dict[str, Any]:
        """What the large kernels are compiled for."""
        D = self.sizes.D
        precision = ("ieee" if torch.version.hip else "tf32x3") if self.q.dtype == torch.float32 else None
        return {
            "L": self.sizes.config.segment, "D": D, "BD": padded(D), "BM": min(tile.BM, plan_tiles.TILE),
            "BN": tile.BN, "TILE": plan_tiles.TILE, "PACKED": self.sizes.packed, "PRECISION": precision,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        """Sizes of the kernel's tiles."""
        wide = self.q.dtype == torch.float32
        return tile_of(self.q.device, kernel, padded(self.sizes.D) * self.q.element_size(), wide)


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
        causal: true; the mode has no other form.
        config: sizes.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q; LSE [B, Hq, T], fp32; bytes as of `kept.views`.

    Raises:
        ValueError: the dtype is fp64, or there are more than 2**23 keys.
    """
    call = _call(q, k, v, document_ids is not None, config, scale)
    s = call.sizes
    out = q.new_empty((s.B, s.Hq, s.T, s.D))
    lse = q.new_empty((s.B, s.Hq, s.T), dtype=torch.float32)
    buffer = torch.empty(kept_bytes(s), dtype=torch.uint8, device=q.device)
    kept = views(buffer, s, q.dtype)
    with on(q.device):
        if document_ids is not None:
            document_bounds(document_ids, kept.starts, kept.stops)
        if s.P:
            _means(call, kept)
        if s.C:
            _lists(call, kept, _nominations(call, kept))
        constants = call.constants(call.tile("attend"))
        attend_kernel[s.programs * (plan_tiles.TILE // constants["BM"]) * s.Hq, s.B](
            call.q, call.k, call.v, *_plan(kept), out, lse, *call.strides(call.q, call.k, call.v), s.Hq, s.Hq // s.Hk,
            s.T, s.S, s.P, s.N, s.first_block, s.exact_limit, s.window, config.num_sinks, call.scale * _LOG2E,
            C=max(s.C, 1), MEANS=s.P > 0, LISTS=s.C > 0, **constants,
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
    call = _call(q, k, v, packed, config, scale)
    s, kept = call.sizes, views(buffer, call.sizes, q.dtype)
    grad_out = unit_stride(grad_out)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta, lse_2 = (torch.empty((s.B, s.Hq, s.T), dtype=torch.float32, device=q.device) for _ in range(2))
    given = lse if grad_lse is None else grad_lse.contiguous()
    with on(q.device):
        query_gradients.delta_kernel[triton.cdiv(s.T, 64) * s.Hq, s.B](
            grad_out, out, given, lse, delta, lse_2, *call.strides(grad_out), s.Hq, s.T,
            D=s.D, BD=padded(s.D), BM=64, HAS_LSE=grad_lse is not None,
        )  # fmt: skip
        readers, reader_counts = _inverse(call, kept)
        constants = call.constants(call.tile("query_gradient"))
        query_gradients.query_gradient_kernel[s.programs * (plan_tiles.TILE // constants["BM"]) * s.Hq, s.B](
            call.q, call.k, call.v, grad_out, *_plan(kept), lse_2, delta, grad_q,
            *call.strides(call.q, call.k, call.v, grad_out), s.Hq, s.Hq // s.Hk, s.T, s.S, s.P, s.N, s.first_block,
            s.exact_limit, s.window, config.num_sinks, call.scale * _LOG2E,
            C=max(s.C, 1), MEANS=s.P > 0, LISTS=s.C > 0, **constants,
        )  # fmt: skip
        grad_means = _mean_gradients(call, grad_out, kept, lse_2, delta) if s.P else delta
        tile = call.tile("key_gradient")
        tile = tile._replace(BN=min(tile.BN, config.segment, plan_tiles.TILE))
        key_gradients.key_gradient_kernel[triton.cdiv(s.S, tile.BN) * (3 if packed else 1) * s.Hk, s.B](
            call.q, call.k, call.v, grad_out, grad_means, readers, reader_counts, kept.starts, kept.stops, lse_2,
            delta, grad_k, grad_v, *call.strides(call.q, call.k, call.v, grad_out), s.Hk, s.Hq // s.Hk, s.T, s.S, s.P,
            s.N, s.exact_limit, s.window, config.num_sinks, call.scale * _LOG2E,
            MEANS=s.P > 0, LISTS=s.C > 0, **call.constants(tile),
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _call(q: Tensor, k: Tensor, v: Tensor, packed: bool, config: HyperAttentionConfig, scale: float) -> _Call:
    """The call's tensors with unit stride along D, and its sizes."""
    if q.dtype == torch.float64:
        raise ValueError("hyper_attention: q is torch.float64; on a GPU it must be fp16, bf16 or fp32")
    if k.shape[2] > _MOST_KEYS:
        raise ValueError(f"hyper_attention: S is {k.shape[2]}; on a GPU it must be at most {_MOST_KEYS}")
    return _Call(unit_stride(q), unit_stride(k), unit_stride(v), sizes_of(q, k, packed, config), scale)


def _plan(kept: Kept) -> tuple[Tensor, ...]:
    """The plan as `attend_kernel` and `query_gradient_kernel` take it."""
    lists = (kept.listed, kept.firsts, kept.counts, kept.first_of)
    return (kept.mean_k, kept.mean_v, *lists, kept.starts, kept.stops)


def document_bounds(document_ids: Tensor, starts: Tensor, stops: Tensor) -> None:
    """Write start and end of the document of each token, int32 [B, S] both; the device checks the order of the ids."""
    B, S = starts.shape
    ordered = torch.empty(B, dtype=torch.bool, device=document_ids.device)
    documents_kernel[(B,)](document_ids.contiguous(), starts, stops, ordered, S, BS=_DOCUMENT_ROWS)
    fine = ordered if B == 1 else ordered.all()
    torch._assert_async(fine, "hyper_attention: document_ids decrease along a row; they must not, save for -1")


def _means(call: _Call, kept: Kept) -> None:
    s, L = call.sizes, call.sizes.config.segment
    choose.pool_kernel[s.P * s.Hk, s.B](
        call.k, call.v, kept.mean_k, kept.mean_v, kept.starts, kept.stops, *call.strides(call.k, call.v), s.Hk, s.S,
        s.P, s.config.num_sinks, L=L, BL=min(L, 64), D=s.D, BD=padded(s.D), PACKED=s.packed,
    )  # fmt: skip


def _nominations(call: _Call, kept: Kept) -> Tensor:
    """Segments that each query nominates, int32 [B, Hq, T, M], -1: none."""
    s, constants = call.sizes, call.constants(call.tile("nominate"))
    nominated = torch.empty((s.B, s.Hq, s.T, s.config.nominations), dtype=torch.int32, device=call.q.device)
    choose.nominate_kernel[s.programs * (plan_tiles.TILE // constants["BM"]) * s.Hq, s.B](
        call.q, kept.mean_k, nominated, kept.starts, kept.stops, *call.strides(call.q), s.Hq, s.Hq // s.Hk, s.T, s.S,
        s.P, s.first_block, s.exact_limit, s.window, M=s.config.nominations, **constants,
    )  # fmt: skip
    return nominated


def _lists(call: _Call, kept: Kept, nominated: Tensor) -> None:
    s = call.sizes
    choose.lists_kernel[s.N * s.Hq, s.B](
        nominated, kept.listed, kept.firsts, kept.counts, kept.first_of, kept.starts, kept.stops, s.Hq, s.T, s.S, s.P,
        s.N, s.first_block, s.exact_limit, C=s.C, M=s.config.nominations, TILE=plan_tiles.TILE, PACKED=s.packed,
        num_warps=4,
    )  # fmt: skip


def _inverse(call: _Call, kept: Kept) -> tuple[Tensor, Tensor]:
    """Tiles that list each segment, int32 [B, Hq, P, N], and how many, int32 [B, Hq, P]."""
    s = call.sizes
    if not s.C:
        return kept.listed, kept.counts
    readers = torch.empty((s.B, s.Hq, s.P, s.N), dtype=torch.int32, device=call.q.device)
    counts = torch.empty((s.B, s.Hq, s.P), dtype=torch.int32, device=call.q.device)
    choose.invert_kernel[triton.cdiv(s.P, 32) * s.Hq, s.B](
        kept.first_of, readers, counts, kept.starts, kept.stops, s.Hq, s.S, s.P, s.N, s.first_block, s.exact_limit,
        BT=64, BP=32, TILE=plan_tiles.TILE, PACKED=s.packed,
    )  # fmt: skip
    return readers, counts


def _mean_gradients(call: _Call, grad_out: Tensor, kept: Kept, lse_2: Tensor, delta: Tensor) -> Tensor:
    """Gradients of means, fp32 [2, B, Hk, P, D]."""
    s, tile = call.sizes, call.tile("mean_gradient")
    programs = triton.cdiv(s.P, tile.BN) * s.Hk
    pieces = max(1, min(16, _PROGRAMS // (programs * s.B), s.N // 4))
    grads = torch.empty((pieces, 2, s.B, s.Hk, s.P, s.D), dtype=torch.float32, device=call.q.device)
    key_gradients.mean_gradient_kernel[programs, s.B, pieces](
        call.q, grad_out, kept.mean_k, kept.mean_v, kept.first_of, kept.starts, kept.stops, lse_2, delta, grads,
        *call.strides(call.q, grad_out), s.Hk, s.Hq // s.Hk, s.T, s.S, s.P, s.N, s.first_block, s.exact_limit,
        s.window, s.config.num_sinks, call.scale * _LOG2E, LISTS=s.C > 0, **call.constants(tile),
    )  # fmt: skip
    return grads.sum(0) if pieces > 1 else grads[0]


def unit_stride(x: Tensor) -> Tensor:
    """The tensor with unit stride along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
