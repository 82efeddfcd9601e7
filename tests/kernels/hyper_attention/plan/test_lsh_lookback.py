"""The look-back by LSH takes the newest older keys of the query's bucket."""

from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.lsh import gray_buckets, projections
from kernels.hyper_attention.reference import log_weights
from tests.kernels.hyper_attention.plan.plan_samples import LOCAL, SHAPES, allowed_keys, inputs


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "causal", "ids"), [shape for shape in SHAPES if shape[5]])
@pytest.mark.parametrize("size", [4, 1000])
def test_the_lookback_is_the_newest_older_keys_of_the_bucket(B, Hq, Hk, T, S, causal, ids, size, monkeypatch):
    monkeypatch.setattr("kernels.hyper_attention.plan.causal_local._STEP", 16)
    documents = whole(B, S, torch.device("cpu")) if ids is None else of_ids(ids)
    q, k = inputs(B, Hq, Hk, T, S)
    config = HyperAttentionConfig(**{**LOCAL, "lookback": size, "segment": 0, "num_projections": 2})
    plan = build_local_plan(q, k, documents, config)
    unread = log_weights(build_local_plan(q, k, documents, replace(config, lookback=0)), Hq, Hk).isneginf()
    projection = projections(config.seed, 1, Hk, 16, 2, q.device)
    query_bucket, key_bucket = (gray_buckets(x, projection, 1)[0] for x in (q, k))
    same = query_bucket[..., None] == key_bucket.repeat_interleave(Hq // Hk, 1)[:, :, None]
    candidate = same & unread & allowed_keys(T, S, causal, ids)
    newest = candidate & (candidate.flip(-1).cumsum(-1).flip(-1) <= size)
    assert torch.equal(~log_weights(plan, Hq, Hk).isneginf() & unread, newest)
