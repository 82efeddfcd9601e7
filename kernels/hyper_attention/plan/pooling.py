"""Mean keys and values of whole segments, and how their gradients go back to the tokens.

Shape letters: B batch, Hk key heads, S keys, P segments, L tokens of a segment, D head size.
"""

import torch
from torch import Tensor

from kernels.hyper_attention.plan.tables import Pooled


def pool(x_BHSD: Tensor, pooled: Pooled) -> Tensor:
    """Mean of each segment without its sinks, [B, Hk, P, D] in the dtype of x."""
    B, H, _, D = x_BHSD.shape
    token, weight = _tokens(pooled, x_BHSD.dtype)
    index = token.flatten(1)[:, None, :, None].expand(B, H, -1, D)
    rows = x_BHSD.gather(2, index).view(B, H, *token.shape[1:], D)
    return torch.einsum("bhpld,bpl->bhpd", rows, weight)


def add_pooled_gradient_(grad_BHSD: Tensor, grad_pooled_BHPD: Tensor, pooled: Pooled) -> None:
    """Add to each token its share of its segment's gradient, in place; each token has one segment at most."""
    token, weight = _tokens(pooled, grad_BHSD.dtype)
    rows = (grad_pooled_BHPD[:, :, :, None] * weight[:, None, ..., None]).flatten(2, 3)
    for batch in range(len(grad_BHSD)):
        grad_BHSD[batch].index_add_(1, token[batch].flatten(), rows[batch])


def log_counts(pooled: Pooled) -> Tensor:
    """Log of the tokens that each pooled key stands for, fp32 [B, P]."""
    return (pooled.length - pooled.skip).float().log()


def _tokens(pooled: Pooled, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token positions int64 [B, P, L] of each segment, and their shares in its mean [B, P, L]."""
    within = torch.arange(pooled.length, device=pooled.start.device)
    token = pooled.start[..., None].long() + within
    share = (within >= pooled.skip[..., None]).to(dtype)
    return token, share / share.sum(-1, keepdim=True)
