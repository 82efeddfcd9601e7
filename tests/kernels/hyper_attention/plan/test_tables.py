from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import ids_of_cu_seqlens, of_ids, whole
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.lsh import gray_buckets, projections
from kernels.hyper_attention.plan.pooling import log_counts, pool
from kernels.hyper_attention.plan.sorting import stable_order
from kernels.hyper_attention.plan.tables import build_plan
from kernels.hyper_attention.reference import log_weights

SMALL = {"block_size": 8, "num_samples": 6, "num_projections": 3, "leaf": 16, "exact_below": 16}
LOCAL = {
    "mode": "causal_local",
    "choice": "means",
    "window": 20,
    "segment": 8,
    "num_sinks": 3,
    "lookback": 0,
    "exact_below": 16,
}
PACKED = torch.tensor([[-1] * 5 + [0] * 40 + [1] * 3 + [2] * 17 + [5] * 64 + [6] + [-1] * 7, [0] * 137])


def inputs(B, Hq, Hk, T, S, D=16):
    generator = torch.Generator().manual_seed(T * S)
    return torch.randn(B, Hq, T, D, generator=generator), torch.randn(B, Hk, S, D, generator=generator)


def allowed_keys(T, S, causal, ids):
    allowed = torch.ones(1, 1, T, S, dtype=torch.bool)
    if causal:
        allowed = allowed & (torch.arange(S) <= torch.arange(S - T, S)[:, None])
    if ids is not None:
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None]) & (ids >= 0)[:, None, None]
    return allowed


SHAPES = [
    # B, Hq, Hk, T, S, causal, documents
    (1, 2, 1, 100, 100, True, None),
    (1, 1, 1, 128, 128, True, None),
    (2, 2, 1, 100, 137, True, None),
    (1, 2, 2, 1, 100, True, None),
    (1, 2, 2, 1, 1, True, None),
    (1, 2, 1, 100, 137, False, None),
    (1, 2, 2, 137, 64, False, None),
    (1, 2, 2, 3, 100, False, None),
    (1, 1, 1, 128, 128, False, None),
    (2, 2, 1, 137, 137, True, PACKED),
    (2, 2, 1, 137, 137, False, PACKED),
]


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "causal", "ids"), SHAPES)
def test_every_allowed_key_counts_once(B, Hq, Hk, T, S, causal, ids):
    q, k = inputs(B, Hq, Hk, T, S)
    documents = whole(B, S, q.device) if ids is None else of_ids(ids)
    plan = build_plan(q, k, causal, documents, HyperAttentionConfig(**SMALL))
    weight = log_weights(plan, Hq, Hk).exp()
    allowed = allowed_keys(T, S, causal, ids).expand_as(weight)
    assert not weight[~allowed].any()
    torch.testing.assert_close(weight.sum(-1), allowed.sum(-1).float())


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


def test_causal_tiles_recurse_by_halves():
    q, k = inputs(1, 1, 1, 64, 64)
    config = HyperAttentionConfig(**{**SMALL, "block_size": 64})
    plan = build_plan(q, k, True, whole(1, 64, q.device), config)
    bounds = [level.segments[0].tolist() for level in plan.levels]
    assert bounds == [[[0, 16, 16, 32], [32, 48, 48, 64]], [[0, 32, 32, 64]]]
    assert torch.equal(plan.band.start[0], torch.arange(64, dtype=torch.int32) // 16 * 16)


def test_neighbouring_buckets_differ_in_one_sign():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)[None, None]
    buckets = gray_buckets(signs, torch.eye(4)[None], 1).flatten()
    assert sorted(buckets.tolist()) == list(range(16))
    ordered = signs[0, 0, buckets.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()


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


def test_documents_of_ids_and_of_offsets():
    ids = ids_of_cu_seqlens(torch.tensor([0, 3, 3, 7]), 9)
    assert ids.tolist() == [[0, 0, 0, 2, 2, 2, 2, -1, -1]]
    documents = of_ids(ids)
    assert documents.start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 8]]
    assert documents.stop.tolist() == [[3, 3, 3, 7, 7, 7, 7, 7, 8]]


@pytest.mark.parametrize("below", [2, 200, 1 << 16, 1 << 17, 1 << 33])
def test_the_order_is_stable(below):
    generator = torch.Generator().manual_seed(below)
    drawn = torch.randint(below, (1, 1, 50), generator=generator)
    key = drawn[..., torch.randint(50, (2, 3, 500), generator=generator)].squeeze()
    assert torch.equal(stable_order(key), key.sort(dim=-1, stable=True).indices)
    key[0, 0, 0] = below - 1
    assert torch.equal(stable_order(key), key.sort(dim=-1, stable=True).indices)


def test_the_order_of_nothing_is_empty():
    assert stable_order(torch.empty((2, 0), dtype=torch.int64)).shape == (2, 0)
