"""Helpers for attention tests: small configurations, tensors, and the gradients of all results of a call."""

import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.nominate import build_nominated_plan
from kernels.hyper_attention.plan.tables import build_plan

PAPER = HyperAttentionConfig(block_size=8, num_samples=6, num_projections=3, leaf=16, exact_below=16)
LOCAL = HyperAttentionConfig(
    mode="causal_local", choice="means", window=20, segment=8, num_sinks=3, lookback=0, exact_below=16
)
LOOK = HyperAttentionConfig(
    mode="causal_local", window=20, segment=0, num_sinks=3, lookback=5, num_projections=2, exact_below=16
)
CHOOSE = HyperAttentionConfig(
    mode="causal_local", choice="means", window=20, segment=8, num_sinks=3, lookback=16, exact_below=16
)
NOMINATE = HyperAttentionConfig(
    mode="causal_local", choice="nominated", window=20, segment=16, num_sinks=3, lookback=16, exact_below=16
)
EXACT = HyperAttentionConfig(exact_below=1 << 40)
PACKED = torch.tensor([[-1] * 5 + [0] * 40 + [1] * 3 + [2] * 17 + [5] * 64 + [6] + [-1] * 7, [0] * 137])
# Every mode with each mask that it supports.
ALL_MODES = [(PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True), (NOMINATE, True)]


def inputs(B=1, Hq=2, Hk=2, T=100, S=None, D=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Hq, T, D), (B, Hk, S or T, D), (B, Hk, S or T, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plan_of(q, k, causal, config, ids=None):
    documents = whole(k.shape[0], k.shape[2], k.device) if ids is None else of_ids(ids)
    if config.mode == "paper":
        return build_plan(q, k, causal, documents, config)
    build = build_nominated_plan if config.nominates else build_local_plan
    return build(q, k, documents, config)


def gradients(outputs, tensors, seed=1):
    """The gradients of a random function of output and log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.masked_fill(x.isinf(), 0.0) * weight).sum()
    return torch.autograd.grad(loss, tensors, retain_graph=True)
