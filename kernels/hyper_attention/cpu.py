"""The estimator on a CPU: torch's flash attention on each part of the plan, merged by log-sum-exp.

Forward: each part gives an output and a log-sum-exp (LSE) for its rows; two parts merge as
out = out1 + sigmoid(lse2 - lse1) * (out2 - out1), lse = log(exp(lse1) + exp(lse2)).
Backward: flash attention's backward of each part with the *global* output and LSE sees P = exp(logits - lse), the true
weights of the merged softmax, and delta = dO . O of the whole row. Its dQ, dK and dV are therefore those of the
estimator, through the merging weights too (as in ring attention); only sums are left to do.

Computed in fp32 (fp64 for fp64 input): torch's bf16 backward is several times slower on CPUs.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.cpu_band import band_backward, band_forward
from kernels.hyper_attention.cpu_level import level_backward, level_forward
from kernels.hyper_attention.cpu_lookback import lookback_backward, lookback_forward
from kernels.hyper_attention.plan import Plan, Pooled
from kernels.hyper_attention.pooling import add_pooled_gradient_, log_counts, pool


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Output of the estimator and its log-sum-exp.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, D].
        plan: for these shapes, on the CPU.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q and LSE [B, Hq, T], at least fp32; 0 and -inf where a query reads no key.
    """
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    lse = q.new_full(q.shape[:3], -torch.inf)
    out = torch.zeros_like(q)
    band_forward(q, k, v, plan.band, scale, out, lse)
    if plan.sinks is not None:
        band_forward(q, k, v, plan.sinks, scale, out, lse)
    if plan.pooled is not None:
        mean_k, mean_v = pool(k, plan.pooled), pool(v, plan.pooled)
        weights = (log_counts(plan.pooled), plan.pooled.hidden)
        band_forward(q, mean_k, mean_v, plan.pooled.band, scale, out, lse, *weights)
    for lookback in plan.lookbacks:
        lookback_forward(q, k, v, lookback, scale, out, lse)
    for level in plan.levels:
        level_forward(q, k, v, level, scale, out, lse)
    return out.to(dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the estimator, in the dtypes of q, k and v.

    Args:
        grad_out: [B, Hq, T, D].
        grad_lse: [B, Hq, T] or None if the LSE was not used.
        q, k, v, plan, scale: as in `forward`.
        out, lse: what `forward` returned.
    """
    dtype, D = q.dtype, q.shape[-1]
    q, k, v, out, grad_out = _wide(q, k, v, out, grad_out)
    if grad_lse is not None:
        # A column on which values are 0, the gradient is 1 and the output is -dLSE: delta becomes dO . O - dLSE.
        q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
        grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
        out = torch.cat([out, -grad_lse.to(out.dtype)[..., None]], -1)
    # Rows without keys: any finite LSE will do, for they are in no part.
    lse = lse.to(q.dtype).masked_fill(lse.isneginf(), 0.0)
    grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    band_backward(grad_out, q, k, v, out, lse, plan.band, scale, grads)
    if plan.sinks is not None:
        band_backward(grad_out, q, k, v, out, lse, plan.sinks, scale, grads)
    if plan.pooled is not None:
        _pooled_backward(grad_out, q, k, v, out, lse, plan.pooled, scale, grads)
    for lookback in plan.lookbacks:
        lookback_backward(grad_out, q, k, v, out, lse, lookback, scale, grads)
    for level in plan.levels:
        level_backward(grad_out, q, k, v, out, lse, level, scale, grads)
    grad_q, grad_k, grad_v = (grad[..., :D].to(dtype) for grad in grads)
    return grad_q, grad_k, grad_v


def _pooled_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pooled: Pooled,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the pooled keys' share to `grads`, (dq, dk, dv), in place."""
    mean_k, mean_v = pool(k, pooled), pool(v, pooled)
    means = (grads[0], torch.zeros_like(mean_k), torch.zeros_like(mean_v))
    weights = (log_counts(pooled), pooled.hidden)
    band_backward(grad_out, q, mean_k, mean_v, out, lse, pooled.band, scale, means, *weights)
    for grad, mean in zip(grads[1:], means[1:], strict=True):
        add_pooled_gradient_(grad, mean, pooled)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous copies (or the tensors themselves) in fp32, or fp64 if they are."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in tensors)
