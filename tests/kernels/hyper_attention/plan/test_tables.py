"""The plan of mode "paper": every allowed key counts once, and blocks and halves match the paper."""

from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.lsh import gray_buckets, projections
from kernels.hyper_attention.plan.tables import build_plan
from kernels.hyper_attention.reference import log_weights
from tests.kernels.hyper_attention.plan.plan_samples import LOCAL, PACKED, SHAPES, SMALL, allowed_keys, inputs


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "causal", "ids"), SHAPES)
def test_every_allowed_key_counts_once(B, Hq, Hk, T, S, causal, ids):
    q, k = inputs(B, Hq, Hk, T, S)
    documents = whole(B, S, q.device) if ids is None else of_ids(ids)
    plan = build_plan(q, k, causal, documents, HyperAttentionConfig(**SMALL))
    weight = log_weights(plan, Hq, Hk).exp()
    allowed = allowed_keys(T, S, causal, ids).expand_as(weight)
    assert not weight[~allowed].any()
    torch.testing.assert_close(weight.sum(-1), allowed.sum(-1).float())


@pytest.mark.parametrize("causal", [False, True])
def test_all_samples_are_all_keys(causal):
    q, k = inputs(1, 2, 2, 97, 97)
    config = HyperAttentionConfig(**{**SMALL, "num_samples": 200})
    weight = log_weights(build_plan(q, k, causal, whole(1, 97, q.device), config), 2, 2).exp()
    assert torch.equal(weight > 0, allowed_keys(97, 97, causal, None).expand_as(weight))
    torch.testing.assert_close(weight[weight > 0], torch.ones_like(weight[weight > 0]))


def test_blocks_are_the_diagonal_of_both_sorted_orders():
    q, k = inputs(1, 1, 1, 128, 128)
    config = HyperAttentionConfig(**{**SMALL, "num_samples": 0})
    exact = log_weights(build_plan(q, k, False, whole(1, 128, q.device), config), 1, 1)[0, 0] == 0
    projection = projections(config.seed, 1, 1, 16, 3, q.device)
    rank_q, rank_k = (gray_buckets(x, projection, 1)[0, 0, 0].sort(stable=True).indices.argsort() for x in (q, k))
    assert torch.equal(exact, (rank_q // 8)[:, None] == (rank_k // 8)[None])


@pytest.mark.parametrize("causal", [False, True])
def test_queries_of_a_key_invert_keys_of_a_query(causal):
    q, k = inputs(2, 2, 1, 137, 137)
    plan = build_plan(q, k, causal, of_ids(PACKED), HyperAttentionConfig(**SMALL))
    slot = torch.arange(137)
    bands = [plan.band, *(level.block for level in plan.levels)]
    config = HyperAttentionConfig(**{**LOCAL, "lookback": 9, "num_projections": 2})
    found = [*build_local_plan(q, k, of_ids(PACKED), replace(config, choice="lsh")).lookbacks]
    found += build_local_plan(q, k, of_ids(PACKED), replace(config, lookback=24)).lookbacks
    assert len(found) == 4
    bands += [lookback.band for lookback in found]
    for start, stop, query_start, query_stop in ((x.start, x.stop, *x.readers) for x in bands):
        keys = (slot >= start[..., None]) & (slot < stop[..., None])
        queries = (slot[:, None] >= query_start[..., None, :]) & (slot[:, None] < query_stop[..., None, :])
        assert torch.equal(keys, queries)
        assert (start.diff() >= 0).all()
        assert (stop.diff() >= 0).all()


def test_packed_documents_are_planned_as_alone():
    q, k = inputs(1, 2, 1, 300, 300)
    ids = torch.tensor([[0] * 90 + [1] * 130 + [2] * 80])
    config = HyperAttentionConfig(**SMALL)
    for causal in (False, True):
        packed = log_weights(build_plan(q, k, causal, of_ids(ids), config), 2, 1)
        for part in (slice(0, 90), slice(90, 220), slice(220, 300)):
            size = part.stop - part.start
            alone = build_plan(q[:, :, part], k[:, :, part], causal, whole(1, size, q.device), config)
            assert torch.equal(packed[:, :, part, part], log_weights(alone, 2, 1))


def test_seed_decides():
    q, k = inputs(1, 1, 1, 200, 200)
    plans = [
        log_weights(build_plan(q, k, False, whole(1, 200, q.device), HyperAttentionConfig(**SMALL, seed=seed)), 1, 1)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(plans[0], plans[1])
    assert not torch.equal(plans[0], plans[2])
