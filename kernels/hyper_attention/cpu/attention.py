"""The estimator on a CPU: torch's flash attention on each part of the plan, merged by log-sum-exp.

Forward: each part gives an output and a log-sum-exp (LSE) for its rows; two parts merge as
out = out1 + sigmoid(lse2 - lse1) * (out2 - out1), lse = log(exp(lse1) + exp(lse2)).
Backward: flash attention's backward of each part with the *global* output and LSE sees P = exp(logits - lse), the true
weights of the merged softmax, and delta = dO . O of the whole row. Its dQ, dK and dV are therefore those of the
estimator, including the part through the merging weights (as in ring attention); they only have to be summed.

Computed in fp32 (fp64 for fp64 input): torch's bf16 backward is several times slower on CPUs.
Key heads are computed one by one, each on a thread of its own.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.hyper_attention.cpu.band import band_backward, band_forward
from kernels.hyper_attention.cpu.heads import Gradients, Head, heads_of
from kernels.hyper_attention.cpu.level import level_backward, level_forward
from kernels.hyper_attention.cpu.lists import lists_backward, lists_forward
from kernels.hyper_attention.cpu.lookback import lookback_backward, lookback_forward
from kernels.hyper_attention.plan.pooling import add_pooled_gradient_, pool
from kernels.hyper_attention.plan.tables import KeyPlan
from kernels.hyper_attention.threads import in_threads


def forward(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output of the estimator and its log-sum-exp.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, D].
        plan: for these shapes, on the CPU.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q and LSE [B, Hq, T], at least fp32. A query that reads no key has output 0
        and LSE -inf.
    """
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    lse = q.new_full(q.shape[:3], -torch.inf)
    out = torch.zeros_like(q)
    means = [] if plan.pooled is None else [pool(x, plan.pooled) for x in (k, v)]

    def forward_head(head: Head) -> None:
        band_forward(head, plan.band)
        if plan.sinks is not None:
            band_forward(head, plan.sinks)
        if plan.pooled is not None:
            mean_k, mean_v = (head.of_key(x) for x in means)
            band_forward(replace(head, k=mean_k, v=mean_v), plan.pooled.band, plan.pooled, _hidden(head, plan))
        if plan.lists is not None:
            lists_forward(head, plan)
        for lookback in plan.lookbacks:
            lookback_forward(head, lookback)
        for level in plan.levels:
            level_forward(head, level)

    in_threads(forward_head, heads_of(q, k, v, out, lse, scale))
    return out.to(dtype), lse


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
        q, k, v, out, grad_out = _with_lse_column(q, k, v, out, grad_out, grad_lse)
    # Rows without keys are in no part, so any finite LSE does.
    lse = lse.to(q.dtype).masked_fill(lse.isneginf(), 0.0)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    means = [] if plan.pooled is None else [pool(x, plan.pooled) for x in (k, v)]
    mean_grads = [torch.zeros_like(x) for x in means]

    def backward_head(head: Head) -> None:
        grad_q, grad_k, grad_v = head.of_queries(grads[0]), head.of_key(grads[1]), head.of_key(grads[2])
        own = Gradients(head.of_queries(grad_out), grad_q, grad_k, grad_v)
        band_backward(head, own, plan.band)
        if plan.sinks is not None:
            band_backward(head, own, plan.sinks)
        if plan.pooled is not None:
            mean_k, mean_v, grad_k, grad_v = (head.of_key(x) for x in (*means, *mean_grads))
            of_means = replace(own, k=grad_k, v=grad_v)
            of_mean = replace(head, k=mean_k, v=mean_v)
            band_backward(of_mean, of_means, plan.pooled.band, plan.pooled, _hidden(head, plan))
        if plan.lists is not None:
            lists_backward(head, own, plan)
        for lookback in plan.lookbacks:
            lookback_backward(head, own, lookback)
        for level in plan.levels:
            level_backward(head, own, level)

    in_threads(backward_head, heads_of(q, k, v, out, lse, scale))
    if plan.pooled is not None:
        for grad, mean_grad in zip(grads[1:], mean_grads, strict=True):
            add_pooled_gradient_(grad, mean_grad, plan.pooled)
    grad_q, grad_k, grad_v = (grad[..., :D].to(dtype) for grad in grads)
    return grad_q, grad_k, grad_v


def _hidden(head: Head, plan: KeyPlan) -> Tensor | None:
    """Segments that each query reads exactly, not as their means; [G, T, M] or None."""
    pooled, lists = plan.pooled, plan.lists
    if lists is not None and pooled is not None:
        row, own = slice(head.row, head.row + 1), head.queries
        of_head = replace(
            lists,
            tiles=replace(lists.tiles, row=lists.tiles.row[row], slot=lists.tiles.slot[row]),
            segment=lists.segment[row, own],
            first=lists.first[row, own],
        )
        return of_head.read(pooled.start.shape[1], len(head.k) - head.q.shape[1])[0]
    return None if pooled is None or pooled.hidden is None else head.of_queries(pooled.hidden)


def _with_lse_column(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """The tensors with one more column: values 0, gradient 1, output -dLSE. So delta becomes dO . O - dLSE."""
    q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
    grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
    return q, k, v, torch.cat([out, -grad_lse.to(out.dtype)[..., None]], -1), grad_out


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, contiguous, in fp32 (fp64 stays fp64); copied only if needed."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in tensors)
