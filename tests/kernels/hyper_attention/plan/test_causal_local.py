"""The plan of mode "causal_local": window, sinks, look-back and means together contain each older key once."""

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.pooling import log_counts
from kernels.hyper_attention.reference import log_weights
from tests.kernels.hyper_attention.plan.plan_samples import LOCAL, SHAPES, allowed_keys, inputs


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "causal", "ids"), [shape for shape in SHAPES if shape[5]])
@pytest.mark.parametrize("lookback", [0, 24])
def test_every_older_key_counts_once_in_the_local_form(B, Hq, Hk, T, S, causal, ids, lookback, monkeypatch):
    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    documents = whole(B, S, torch.device("cpu")) if ids is None else of_ids(ids)
    config = HyperAttentionConfig(**{**LOCAL, "lookback": lookback})
    plan = build_local_plan(*inputs(B, Hq, Hk, T, S), documents, config)
    weight = log_weights(plan, Hq, Hk).exp()
    allowed = allowed_keys(T, S, causal, ids).expand_as(weight)
    assert not weight[~allowed].any()
    total = weight.sum(-1)
    if plan.pooled is not None:
        pooled, counts = plan.pooled, log_counts(plan.pooled).exp()
        slot = torch.arange(counts.shape[1])
        read = (slot >= pooled.band.start[..., None]) & (slot < pooled.band.stop[..., None])
        read = read[:, None].expand(B, Hq, T, -1)
        if pooled.hidden is not None:
            read = read & ~(slot == pooled.hidden[..., None]).any(-2)
        total = total + (read * counts[:, None, None]).sum(-1)
    torch.testing.assert_close(total, allowed.sum(-1).float())
