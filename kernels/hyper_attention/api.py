"""The public function, as a PyTorch operator: it compiles, checkpoints, autocasts and exports like any other.

The plan is made again in the backward pass from the same queries and keys (it is a function of them and of the seed),
so that only q, k, v, the output, its log-sum-exp and the chosen segments, the dearest part of a plan, are kept between
the passes.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, N documents, M chosen segments.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention import documents
from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.cpu import attention as cpu_attention
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.choose_segments import num_chosen
from kernels.hyper_attention.plan.tables import KeyPlan, build_plan

_WORDS: dict[str, tuple[Any, ...]] = {"mode": ("paper", "causal_local"), "choice": ("means", "lsh")}


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

    Documents of at most `config.exact_below` keys get exact attention. Under autocast, inputs take autocast's dtype;
    arithmetic is fp32 inside. Equal inputs and configuration give equal results, bit for bit.

    Args:
        q: [B, Hq, T, D], fp16, bf16, fp32 (or fp64 on a CPU), 16 <= D <= 256, any strides.
        k: [B, Hk, S, D] of the same dtype; Hq is a multiple of Hk.
        v: [B, Hk, S, D].
        causal: query t reads keys 0 .. t + S - T, as with S - T keys before the queries (a prefix or KV cache).
        config: sizes; `HyperAttentionConfig()` if None.
        scale: factor of the logits, 1 / sqrt(D) if None.
        document_ids: integers [B, T] that do not decrease along a row; tokens attend within their document only. -1 is
            padding, anywhere: nothing reads it, its output is 0. Needs S == T.
        cu_seqlens: instead, for B == 1: integers [N + 1], 0 and the ends of the documents; what follows is padding.
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
    plain = ids is None and not return_lse and (not causal or q.shape[2] == k.shape[2])
    if plain and k.shape[2] <= config.exact_below:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    out, lse, _ = _forward(q, k, v, ids, causal, scale, _settings(config), num_chosen(config))
    return (out, lse) if return_lse else out


@torch.library.custom_op("hyper_attention::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    settings: Sequence[int],
    most_chosen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # else forward and backward would hash in different precision
        plan = _plan(q, k, document_ids, causal, settings)
        out, lse = _path(q.device).forward(q, k, v, plan, scale)
    hidden = None if plan.pooled is None else plan.pooled.hidden
    return out, lse, _no_choice(q, most_chosen) if hidden is None else hidden


@torch.library.custom_op("hyper_attention::backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    settings: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        plan = _plan(q, k, document_ids, causal, settings, chosen)
        grads = _path(q.device).backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide), _no_choice(q, rest[-1])


@_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, document_ids, ctx.causal, ctx.scale, ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, chosen, document_ids = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward(grad_out, grad_lse, q, k, v, out, lse, chosen, document_ids, ctx.causal, ctx.scale, ctx.settings)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _path(device: torch.device) -> ModuleType:
    """The module whose `forward` and `backward` run on this device; ROCm's devices are called cuda too."""
    if device.type == "cpu":
        return cpu_attention
    if device.type == "cuda":
        return import_module("kernels.hyper_attention.gpu.attention")
    raise ValueError(f"hyper_attention: the device is {device.type}; it must be cpu or cuda")


def _plan(
    q: Tensor, k: Tensor, ids: Tensor | None, causal: bool, settings: Sequence[int], chosen: Tensor | None = None
) -> KeyPlan:
    if ids is None:
        tokens = documents.whole(k.shape[0], k.shape[2], k.device)
    else:
        falls = ((ids[:, 1:] < ids[:, :-1].cummax(1).values) & (ids[:, 1:] != documents.PADDING)).any()
        message = "hyper_attention: document_ids decrease along a row; they must not, save for -1 on padding"
        if ids.device.type != "cpu":
            torch._assert_async(~falls, message)
        elif falls:
            raise ValueError(message)
        tokens = documents.of_ids(ids)
    config = _config(settings)
    if config.mode == "causal_local":
        return build_local_plan(q, k, tokens, config, chosen)
    return build_plan(q, k, causal, tokens, config)


def _no_choice(q: Tensor, most: int) -> Tensor:
    """Where no segment was chosen, and as the fake of those that were; int32 [B, Hq, T, M]."""
    return q.new_zeros((*q.shape[:3], most), dtype=torch.int32)


def _settings(config: HyperAttentionConfig) -> list[int]:
    """The configuration as an operator takes it: words by their place among the words that are allowed."""
    return [_WORDS[name].index(value) if name in _WORDS else value for name, value in asdict(config).items()]


def _config(settings: Sequence[int]) -> HyperAttentionConfig:
    names = [field.name for field in fields(HyperAttentionConfig)]
    values: dict[str, Any] = dict(zip(names, settings, strict=True))
    return HyperAttentionConfig(**values | {name: words[values[name]] for name, words in _WORDS.items()})


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"hyper_attention: {shapes} disagree; they must be [B, Hq, T, D] and twice [B, Hk, S, D]")
    if min(*q.shape, *k.shape) < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"hyper_attention: {shapes}: no size may be 0, and Hq must be a multiple of Hk")
    if not 16 <= q.shape[3] <= 256:
        raise ValueError(f"hyper_attention: D is {q.shape[3]}; it must be from 16 to 256")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"hyper_attention: T is {q.shape[2]}, above S = {k.shape[2]}; with causal it may not be")
    if not q.dtype.is_floating_point:
        raise ValueError(f"hyper_attention: q is {q.dtype}; it must be a floating type")
    if not q.device == k.device == v.device:
        raise ValueError(f"hyper_attention: q, k, v lie on {q.device}, {k.device}, {v.device}; they must be together")
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
