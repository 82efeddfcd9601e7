"""Which kernels a call on a GPU takes, and how many bytes their forward pass keeps for the backward pass.

This module does not import Triton.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.gpu.local import kept as local
from kernels.hyper_attention.gpu.paper import kept as paper


def kernels_of(device: torch.device, config: HyperAttentionConfig) -> Literal["paper", "local"] | None:
    """The package of the kernels that also build the plan; None on a CPU and for the choices "means" and "lsh"."""
    if device.type != "cuda":
        return None
    if config.mode == "paper":
        return "paper"
    return "local" if config.nominates else None


def kept_bytes(q: Tensor, k: Tensor, causal: bool, packed: bool, config: HyperAttentionConfig) -> int:
    """Bytes that the forward pass of these kernels keeps."""
    if config.mode == "paper":
        return paper.kept_bytes(paper.sizes_of(q, k, causal, packed, config))
    return local.kept_bytes(local.sizes_of(q, k, packed, config))
