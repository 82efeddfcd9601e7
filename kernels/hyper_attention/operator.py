"""HyperAttention as a PyTorch operator: it compiles, checkpoints, autocasts and exports like any other.

For the backward pass, the forward pass keeps q, k, v, the output, its log-sum-exp and the expensive part of the plan:
the chosen segments, or on a GPU the lists and orders that the kernels made. The backward pass computes the rest of the
plan again from the same tensors and seed.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, M chosen segments.
"""

import json
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.hyper_attention import documents
from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.cpu import attention as cpu_attention
from kernels.hyper_attention.gpu import kept_sizes
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.choose_segments import num_chosen
from kernels.hyper_attention.plan.nominate import build_nominated_plan
from kernels.hyper_attention.plan.tables import KeyPlan, build_plan


@torch.library.custom_op("hyper_attention::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    settings: str,
    exact_below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, T, D], log-sum-exp [B, Hq, T] and what `backward` needs of the plan.

    Args:
        q, k, v, document_ids, causal, scale: as of `hyper_attention`.
        settings: the configuration as JSON.
        exact_below: tokens; overrides that of `settings`.
    """
    config = _config(settings, exact_below)
    with torch.autocast(q.device.type, enabled=False):  # forward and backward must hash in the same precision
        kernels = _kernels(q, config)
        if kernels is not None:
            result: tuple[Tensor, Tensor, Tensor] = kernels.forward(q, k, v, document_ids, causal, config, scale)
            return result
        plan = plan_of(q, k, document_ids, causal, config)
        out, lse = _path(q.device).forward(q, k, v, plan, scale)
    return out, lse, _kept_like(q, k, document_ids, causal, config) if plan.chosen is None else plan.chosen


@torch.library.custom_op("hyper_attention::backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    settings: str,
    exact_below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from those of the output and of the log-sum-exp (None if it was not used)."""
    config = _config(settings, exact_below)
    with torch.autocast(q.device.type, enabled=False):
        kernels = _kernels(q, config)
        if kernels is not None:
            packed = document_ids is not None
            tensors = (grad_out, grad_lse, q, k, v, out, lse, kept)
            gradients: tuple[Tensor, Tensor, Tensor] = kernels.backward(*tensors, packed, causal, config, scale)
            return gradients
        plan = plan_of(q, k, document_ids, causal, config, kept)
        grads = _path(q.device).backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    settings: str,
    exact_below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = _kept_like(q, k, document_ids, causal, _config(settings, exact_below))
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide), kept


@backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, document_ids, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, kept, document_ids = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward(grad_out, grad_lse, q, k, v, out, lse, kept, document_ids, *ctx.rest)
    return (*grads, None, None, None, None, None)


forward.register_autograd(_differentiate, setup_context=_keep)


def plan_of(
    q: Tensor,
    k: Tensor,
    ids: Tensor | None,
    causal: bool,
    config: HyperAttentionConfig,
    chosen: Tensor | None = None,
) -> KeyPlan:
    """The plan as tables, for a CPU and for the reference.

    Args:
        q, k, causal, config: as of `hyper_attention`.
        ids: document of each token, [B, T], or None.
        chosen: `KeyPlan.chosen` of an earlier plan for the same tensors; None: this plan chooses.

    Raises:
        ValueError: the ids decrease. On a GPU this is a device-side assertion instead.
    """
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
    if config.mode == "paper":
        return build_plan(q, k, causal, tokens, config)
    if config.nominates:
        return build_nominated_plan(q, k, tokens, config, chosen)
    return build_local_plan(q, k, tokens, config, chosen)


def _kernels(q: Tensor, config: HyperAttentionConfig) -> ModuleType | None:
    """The module of the kernels that build the plan themselves; None if the call needs a plan of tables."""
    name = kept_sizes.kernels_of(q.device, config)
    return None if name is None else import_module(f"kernels.hyper_attention.gpu.{name}.launches")


def _path(device: torch.device) -> ModuleType:
    """The module whose `forward` and `backward` take a plan of tables on this device; ROCm devices are "cuda" too."""
    if device.type == "cpu":
        return cpu_attention
    if device.type == "cuda":
        return import_module("kernels.hyper_attention.gpu.dense")
    raise ValueError(f"hyper_attention: the device is {device.type}; it must be cpu or cuda")


def _kept_like(q: Tensor, k: Tensor, document_ids: Tensor | None, causal: bool, config: HyperAttentionConfig) -> Tensor:
    """What the forward pass keeps of its plan: chosen segments, int32 [B, Hq, T, M], or the bytes of the kernels."""
    if kept_sizes.kernels_of(q.device, config) is not None:
        size = kept_sizes.kept_bytes(q, k, causal, document_ids is not None, config)
        return q.new_empty(size, dtype=torch.uint8)
    return q.new_zeros((*q.shape[:3], num_chosen(config)), dtype=torch.int32)


def _config(settings: str, exact_below: int) -> HyperAttentionConfig:
    return replace(HyperAttentionConfig(**json.loads(settings)), exact_below=int(exact_below))
