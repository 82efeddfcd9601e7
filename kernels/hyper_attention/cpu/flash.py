"""torch's CPU flash attention with its log-sum-exp, as one part of a merged softmax.

Shape letters: N tiles, H heads, R rows, C keys, D head size.
"""

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def part_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [N, H, R, D] and log-sum-exp [N, H, R] of softmax(scale * q k^T + bias) v.

    Args:
        q: [N, H, R, D], fp32 or fp64, any strides.
        k: [N, H, C, D].
        v: [N, H, C, D].
        scale: factor of the logits.
        causal: row r reads keys 0..r only; R == C.
        bias: [N, 1, 1, C] or None, added to the logits.
    """
    out, lse = _FORWARD(q, k, v, 0.0, causal, attn_mask=_bias_like(bias, q), scale=scale)
    return out, lse


def part_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of dq, dk and dv, given the output and log-sum-exp of the whole softmax; shapes as above."""
    mask = _bias_like(bias, q)
    grad_q, grad_k, grad_v = _BACKWARD(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return grad_q, grad_k, grad_v


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part, [..., D] and [...], into `out` and `lse` in place; the part's log-sum-exp must be finite."""
    out.lerp_(part_out, torch.sigmoid(part_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def _bias_like(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias in the dtype of q: torch reads a mask of another dtype wrongly, without an error."""
    return None if bias is None else bias.to(q.dtype)
