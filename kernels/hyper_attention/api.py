"""The public function.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, N documents.
"""

import math
from functools import partial

import torch
from torch import Tensor

from kernels.hyper_attention import documents, operator
from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.routing import (
    exact_attention,
    exact_below,
    longest_document,
    packed_exact_attention,
    path_of,
)

HEAD_SIZES = range(16, 257)  # that D may have


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    *,
    config: HyperAttentionConfig | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in near-linear time and linear memory, with the exact gradient of its estimator in q, k and v.

    Documents of at most `config.exact_below` keys get exact attention; `explain` says what a call does. Under autocast,
    inputs take autocast's dtype; arithmetic is fp32 inside. On the path "hyper_attention", equal inputs and
    configuration give equal results, bit for bit. On the others torch's kernels run, whose gradients on a GPU may
    differ in the last bits unless `torch.use_deterministic_algorithms(True)` is set.

    Args:
        q: [B, Hq, T, D], fp16, bf16, fp32 (or fp64 on a CPU), 16 <= D <= 256, any strides.
        k: [B, Hk, S, D] of the same dtype; Hq is a multiple of Hk.
        v: [B, Hk, S, D].
        causal: query t reads keys 0 .. t + S - T, as with S - T keys before the queries (a prefix or KV cache).
        config: sizes; `HyperAttentionConfig()` if None.
        scale: factor of the logits, 1 / sqrt(D) if None.
        document_ids: integers [B, T] that do not decrease along a row; tokens attend within their document only. -1
            marks padding and may stand anywhere: no query reads it, and its output is 0. Padding ends a document: equal
            ids on both sides of it are two documents. Needs S == T.
        cu_seqlens: the documents as offsets, in place of `document_ids`, for B == 1: integers [N + 1], 0 and the end of
            each document; tokens after the last end are padding.
        return_lse: also return the log-sum-exp, which is differentiable too.

    Returns:
        Output [B, Hq, T, D] in the dtype of q; with `return_lse` also [B, Hq, T], at least fp32, -inf on padding.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a value is out of range; the message names it and the limit.
    """
    config = config or HyperAttentionConfig()
    _check_tensors(q, k, v, causal)
    if config.mode == "causal_local" and not causal:
        raise ValueError("hyper_attention: causal is False, but mode 'causal_local' has a window; it needs causal=True")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"hyper_attention: scale is {scale}; it must be finite")
    ids = _document_ids(q, k, document_ids, cu_seqlens)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    limit = exact_below(q, k, causal, config)
    path = path_of(q, k, causal, limit, None if ids is None else partial(longest_document, ids), return_lse)
    if path == "sdpa":
        return exact_attention(q, k, v, causal, scale)
    if path == "varlen":
        assert ids is not None  # noqa: S101 - for the type checker
        return packed_exact_attention(q, k, v, ids, causal, scale)
    out, lse, _ = operator.forward(q, k, v, ids, causal, scale, config.to_json(), limit)
    return (out, lse) if return_lse else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"hyper_attention: {shapes} disagree; q must be [B, Hq, T, D], k and v both [B, Hk, S, D]")
    if min(*q.shape, *k.shape) < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"hyper_attention: {shapes}: no size may be 0, and Hq must be a multiple of Hk")
    if not HEAD_SIZES[0] <= q.shape[3] <= HEAD_SIZES[-1]:  # torch.compile cannot look a size up in a range
        raise ValueError(f"hyper_attention: D is {q.shape[3]}; it must be from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"hyper_attention: T is {q.shape[2]}, above S = {k.shape[2]}; causal attention needs T <= S")
    if not q.dtype.is_floating_point:
        raise ValueError(f"hyper_attention: q is {q.dtype}; it must be a floating type")
    if not q.device == k.device == v.device:
        raise ValueError(f"hyper_attention: q, k, v lie on {q.device}, {k.device}, {v.device}; use one device")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"hyper_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one dtype")


def _document_ids(q: Tensor, k: Tensor, document_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Document of each token, [B, T], or None."""
    (B, _, T, _), S = q.shape, k.shape[2]
    if document_ids is None and cu_seqlens is None:
        return None
    if document_ids is not None and cu_seqlens is not None:
        raise ValueError("hyper_attention: document_ids and cu_seqlens are both given; give one")
    if S != T:
        raise ValueError(f"hyper_attention: documents with T = {T} and S = {S}; T must equal S")
    if document_ids is not None:
        if document_ids.shape != (B, T) or document_ids.is_floating_point():
            given = f"{document_ids.dtype} {tuple(document_ids.shape)}"
            raise ValueError(f"hyper_attention: document_ids is {given}; it must be integers of shape {(B, T)}")
        return document_ids
    assert cu_seqlens is not None  # noqa: S101 - for the type checker
    if B != 1 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
        given = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} with B = {B}"
        raise ValueError(f"hyper_attention: cu_seqlens is {given}; it must be integers [N + 1], and B must be 1")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends != sorted(ends) or ends[-1] > T:
            raise ValueError(f"hyper_attention: cu_seqlens is {ends[:8]}; it must rise from 0 to at most T = {T}")
    return documents.ids_of_cu_seqlens(cu_seqlens, T)
