"""Segments are chosen by the logits of their mean keys."""

import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.pooling import pool
from tests.kernels.hyper_attention.plan.plan_samples import LOCAL, inputs


def test_the_chosen_segments_have_the_largest_mean_logits(monkeypatch):
    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    monkeypatch.setattr("kernels.hyper_attention.plan.choose_segments._ROWS", 50)
    q, k = inputs(1, 4, 2, 100, 137)
    plan = build_local_plan(q, k, whole(1, 137, q.device), HyperAttentionConfig(**{**LOCAL, "lookback": 24}))
    mean = pool(k, plan.pooled).repeat_interleave(2, 1)
    logit = (q @ mean.mT).masked_fill(torch.arange(17) >= plan.pooled.band.stop[:, None, :, None], -torch.inf)
    for row in range(100):
        available = int(plan.pooled.band.stop[0, row])
        for head in range(4):
            best = logit[0, head, row].topk(min(3, available)).indices.sort().values.tolist()
            assert plan.pooled.hidden[0, head, row].tolist() == best + [17] * (3 - len(best))
