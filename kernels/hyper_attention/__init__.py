"""HyperAttention (arXiv:2310.05869): attention in near-linear time with exact gradients of its estimator."""

from kernels.hyper_attention.api import hyper_attention
from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.routing import Route, explain

__all__ = ["HyperAttentionConfig", "Route", "explain", "hyper_attention"]
