"""Results and gradients of the public function on a CPU, against the reference and against exact attention."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention import HyperAttentionConfig, cpu, hyper_attention
from kernels.hyper_attention.cpu_flash import merge_
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.hashing import projections
from kernels.hyper_attention.plan import build_plan
from kernels.hyper_attention.plan_local import build_local_plan
from kernels.hyper_attention.reference import reference_attention

PAPER = HyperAttentionConfig(block_size=8, num_samples=6, num_projections=3, leaf=16, exact_below=16)
LOCAL = HyperAttentionConfig(mode="causal_local", window=20, segment=8, num_sinks=3, lookback=0, exact_below=16)
LOOK = HyperAttentionConfig(
    mode="causal_local", window=20, segment=0, num_sinks=3, lookback=5, num_projections=2, exact_below=16
)
CHOOSE = HyperAttentionConfig(mode="causal_local", window=20, segment=8, num_sinks=3, lookback=16, exact_below=16)
EXACT = HyperAttentionConfig(exact_below=1 << 40)
PACKED = torch.tensor([[-1] * 5 + [0] * 40 + [1] * 3 + [2] * 17 + [5] * 64 + [6] + [-1] * 7, [0] * 137])


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr("kernels.hyper_attention.plan_local._STEP", 16)


def inputs(B=1, Hq=2, Hk=2, T=100, S=None, D=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Hq, T, D), (B, Hk, S or T, D), (B, Hk, S or T, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plan_of(q, k, causal, config, ids=None):
    documents = whole(k.shape[0], k.shape[2], k.device) if ids is None else of_ids(ids)
    if config.mode == "causal_local":
        return build_local_plan(q, k, documents, config)
    return build_plan(q, k, causal, documents, config)


def gradients(outputs, tensors, seed=1):
    """Gradients of a random function of output and log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.masked_fill(x.isinf(), 0.0) * weight).sum()
    return torch.autograd.grad(loss, tensors, retain_graph=True)


CASES = [
    # B, Hq, Hk, T, S, D, causal, config, documents
    (1, 2, 1, 100, 100, 16, True, PAPER, None),
    (2, 4, 2, 100, 137, 20, True, PAPER, None),
    (1, 2, 1, 1, 100, 16, True, PAPER, None),
    (1, 1, 1, 1, 1, 16, True, PAPER, None),
    (1, 2, 1, 101, 137, 16, False, PAPER, None),
    (1, 4, 2, 137, 61, 16, False, PAPER, None),
    (1, 2, 2, 3, 100, 16, False, PAPER, None),
    (2, 4, 2, 137, 137, 16, True, PAPER, PACKED),
    (2, 4, 2, 137, 137, 16, False, PAPER, PACKED),
    (1, 2, 1, 100, 100, 16, True, LOCAL, None),
    (1, 2, 1, 100, 100, 16, True, LOOK, None),
    (1, 2, 1, 100, 100, 16, True, CHOOSE, None),
    (2, 4, 2, 100, 137, 20, True, LOCAL, None),
    (2, 4, 2, 100, 137, 20, True, LOOK, None),
    (2, 4, 2, 100, 137, 20, True, CHOOSE, None),
    (1, 2, 1, 1, 100, 16, True, LOCAL, None),
    (1, 2, 1, 1, 100, 16, True, LOOK, None),
    (1, 2, 1, 1, 100, 16, True, CHOOSE, None),
    (1, 1, 1, 1, 1, 16, True, LOCAL, None),
    (1, 1, 1, 1, 1, 16, True, LOOK, None),
    (1, 1, 1, 1, 1, 16, True, CHOOSE, None),
    (2, 4, 2, 137, 137, 16, True, LOCAL, PACKED),
    (2, 4, 2, 137, 137, 16, True, LOOK, PACKED),
    (2, 4, 2, 137, 137, 16, True, CHOOSE, PACKED),
]


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "D", "causal", "config", "ids"), CASES)
def test_cpu_is_the_reference(B, Hq, Hk, T, S, D, causal, config, ids):
    tensors = inputs(B, Hq, Hk, T, S, D)
    mine = hyper_attention(*tensors, causal, config=config, document_ids=ids, return_lse=True)
    plan = plan_of(*tensors[:2], causal, config, ids)
    truth = reference_attention(*tensors, plan, 1 / math.sqrt(D))
    torch.testing.assert_close(mine, truth)
    torch.testing.assert_close(gradients(mine, tensors), gradients(truth, tensors))
    torch.testing.assert_close(gradients(mine[:1], tensors), gradients(truth[:1], tensors))


@pytest.mark.parametrize(
    ("causal", "config"), [(False, PAPER), (True, PAPER), (True, LOCAL), (True, LOOK), (True, CHOOSE)]
)
def test_gradients_are_those_of_the_estimator(causal, config):
    q, k, v = inputs(Hq=2, Hk=1, T=37)
    plan = plan_of(q, k, causal, config)

    def reference(q, k, v):
        return reference_attention(q, k, v, plan, 0.3)

    assert torch.autograd.gradcheck(reference, (q, k, v), fast_mode=True)

    def public(q, k, v):
        # The choice of keys is not differentiated, so finite differences must not change it.
        return FixedPlan.apply(q, k, v, plan)

    assert torch.autograd.gradcheck(public, (q, k, v), fast_mode=True)


class FixedPlan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan):
        out, lse = cpu.forward(q, k, v, plan, 0.3)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *cpu.backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.plan, 0.3), None


def test_a_detached_log_sum_exp_is_noticed():
    """What the authors' code does in half precision; the comparison above must tell it from the true gradient."""
    q, k, v = inputs(T=64)
    plan = plan_of(q, k, True, PAPER)
    truth = gradients(reference_attention(q, k, v, plan, 0.25)[:1], (q, k, v))
    band_out, band_lse = reference_attention(q, k, v, type(plan)(plan.band, ()), 0.25)
    level = reference_attention(q, k, v, type(plan)(plan_of(q, k, False, PAPER).band, plan.levels), 0.25)
    share = torch.sigmoid(level[1] - band_lse)[..., None]
    merged = torch.lerp(band_out, level[0], share)
    torch.testing.assert_close(merged, reference_attention(q, k, v, plan, 0.25)[0])
    torch.testing.assert_close(gradients([merged], (q, k, v)), truth)
    detached = gradients([torch.lerp(band_out, level[0], share.detach())], (q, k, v))
    for index, name in enumerate("qk"):
        error = (detached[index] - truth[index]).norm() / truth[index].norm()
        assert error > 0.05, name
    torch.testing.assert_close(detached[2], truth[2])


@pytest.mark.parametrize("T", [1, 2, 63, 97])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        EXACT,
        HyperAttentionConfig(block_size=128, leaf=16, exact_below=16),
        HyperAttentionConfig(block_size=8, num_samples=128, leaf=16, exact_below=16),
        HyperAttentionConfig(mode="causal_local", window=128, exact_below=16),
        HyperAttentionConfig(mode="causal_local", window=16, segment=1, num_sinks=0, lookback=0, exact_below=16),
        HyperAttentionConfig(mode="causal_local", window=16, segment=8, num_sinks=3, lookback=128, exact_below=16),
    ],
    ids=["short", "block", "samples", "window", "pools of one", "all chosen"],
)
def test_exact_limits(T, causal, config):
    if config.mode == "causal_local" and not causal:
        return
    q, k, v = inputs(T=T)
    exact = scaled_dot_product_attention(q, k, v, is_causal=causal)
    mine = hyper_attention(q, k, v, causal, config=config, return_lse=True)
    torch.testing.assert_close(mine[0], exact)
    torch.testing.assert_close(gradients(mine[:1], (q, k, v)), gradients([exact], (q, k, v)))


def test_a_lookback_over_one_full_bucket_is_exact_attention():
    config = HyperAttentionConfig(
        mode="causal_local", window=16, segment=0, num_sinks=0, lookback=200, num_projections=1, exact_below=16
    )
    tensors = inputs(Hq=2, Hk=1, T=150, dtype=torch.float64)
    side = projections(config.seed, 1, 1, 16, 1, torch.device("cpu")).double()[0, :, 0]
    for x in tensors[:2]:
        x.data += side * (1 - x.data @ side)[..., None].clamp(min=0) / side.square().sum()
    mine = hyper_attention(*tensors, True, config=config, return_lse=True)
    exact = scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mine[0], exact)
    torch.testing.assert_close(gradients(mine[:1], tensors), gradients([exact], tensors))


def test_a_prefix_is_exact_attention_from_the_end():
    q, k, v = inputs(Hq=4, Hk=2, T=20, S=97)
    mask = torch.arange(97) <= torch.arange(77, 97)[:, None]
    exact = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(hyper_attention(q, k, v, True, config=EXACT), exact)


@pytest.mark.parametrize(
    "config", [EXACT, PAPER, LOCAL, LOOK, CHOOSE], ids=["exact", "paper", "local", "look", "choose"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_each_document_alone(config, causal):
    if config.mode == "causal_local" and not causal:
        return
    lengths = [90, 1, 17, 130]
    tensors = inputs(Hq=2, Hk=1, T=sum(lengths) + 4)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = hyper_attention(*tensors, causal, config=config, cu_seqlens=ends)
    assert not packed[:, :, -4:].any()
    packed_gradients = gradients([packed], tensors)
    assert not any(x[:, :, -4:].any() for x in packed_gradients)
    ids = torch.repeat_interleave(torch.tensor([0, 3, 4, 9, -1]), torch.tensor([*lengths, 4]))[None]
    assert torch.equal(packed, hyper_attention(*tensors, causal, config=config, document_ids=ids))
    for start, stop in itertools.pairwise(ends.tolist()):
        alone = hyper_attention(*(x[:, :, start:stop] for x in tensors), causal, config=config)
        torch.testing.assert_close(packed[:, :, start:stop], alone)


def test_an_edited_document_changes_no_other():
    ids = torch.tensor([[0] * 50 + [1] * 50 + [-1] * 10])
    for config, causal in ((PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True)):
        results = []
        for edit in (0.0, 1.0):
            tensors = inputs(T=110)
            for x in tensors:
                x.data[:, :, 50:] += edit
            results.append(hyper_attention(*tensors, causal, config=config, document_ids=ids)[:, :, :50])
        assert torch.equal(*results)


@pytest.mark.parametrize(
    "config",
    [
        LOCAL,
        LOOK,
        CHOOSE,
        pytest.param(PAPER, marks=pytest.mark.xfail(strict=True, reason="blocks are cut by rank among all")),
    ],
    ids=["local", "look", "choose", "paper"],
)
@pytest.mark.parametrize("edited", [40, 101, 127])
def test_the_future_changes_no_bit_of_the_past(config, edited):
    results = []
    for edit in (0.0, 3.0):
        tensors = inputs(T=160, dtype=torch.float32)
        for x in tensors:
            x.data[:, :, edited:] = x.data[:, :, edited:].flip(2) + edit
        out, lse = hyper_attention(*tensors, True, config=config, return_lse=True)
        past = [out[:, :, :edited], lse[:, :, :edited]]
        results.append([*past, *(x[:, :, :edited] for x in gradients(past, tensors))])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("causal", [False, True])
def test_the_denominator_is_unbiased(causal):
    q, k, v = inputs(Hq=1, Hk=1, T=64)
    mask = torch.ones(64, 64).tril().bool() if causal else torch.ones(64, 64).bool()
    exact = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf).logsumexp(-1)
    sizes = {"block_size": 8, "num_samples": 6, "num_projections": 3, "leaf": 8, "exact_below": 8}
    ratios = []
    with torch.no_grad():
        for seed in range(400):
            config = HyperAttentionConfig(**sizes, seed=seed)
            ratios.append((hyper_attention(q, k, v, causal, config=config, return_lse=True)[1] - exact).exp())
    ratio = torch.stack(ratios)
    error = ratio.std(0) / math.sqrt(len(ratio))
    z = (ratio.mean(0) - 1)[error > 1e-9] / error[error > 1e-9]
    assert z.abs().max() < 5
    assert z.abs().mean() < 1.2


def test_more_samples_are_closer():
    q, k, v = inputs(Hq=8, Hk=8, T=512)
    exact = scaled_dot_product_attention(q, k, v)
    errors = []
    for samples in (8, 32, 128):
        config = HyperAttentionConfig(block_size=16, num_samples=samples, exact_below=16)
        errors.append((hyper_attention(q, k, v, config=config) - exact).norm().item())
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.75 * errors[1]


@pytest.mark.parametrize(
    ("config", "causal"), [(PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True)]
)
def test_ones_stay_ones(config, causal):
    q, k, v = inputs(T=111)
    out = hyper_attention(q, k, torch.ones_like(v), causal, config=config)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize(
    ("config", "causal"), [(PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True)]
)
@pytest.mark.parametrize("size", [1e3, 1e-30, 0.0])
def test_extreme_logits_stay_finite(config, causal, size):
    tensors = inputs(T=100, dtype=torch.float32)
    tensors[0].data *= size
    outputs = hyper_attention(*tensors, causal, config=config, return_lse=True)
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, tensors)))


@pytest.mark.parametrize(
    ("config", "causal"), [(PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_rounding_only(config, causal, dtype):
    tensors = inputs(Hq=4, Hk=2, T=100, D=64, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    out, lse = hyper_attention(*tensors, causal, config=config, return_lse=True)
    truth = hyper_attention(*wide, causal, config=config, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, truth[1])
    torch.testing.assert_close(out.float(), truth[0], atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    for mine, exact in zip(gradients([out], tensors), gradients(truth[:1], wide), strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - exact).norm() < torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    ("config", "causal"), [(PAPER, False), (PAPER, True), (LOCAL, True), (LOOK, True), (CHOOSE, True)]
)
@pytest.mark.parametrize(("T", "D"), [(17, 16), (63, 60), (211, 80), (129, 256)])
def test_odd_shapes_and_strides_twice_the_same(config, causal, T, D):
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 4, 2, T, D=D))
    out = hyper_attention(q, k, v, causal, config=config)
    assert torch.equal(out, hyper_attention(q, k, v, causal, config=config))
    assert torch.equal(out, hyper_attention(*(x.contiguous() for x in (q, k, v)), causal, config=config))
    truth, _ = reference_attention(q, k, v, plan_of(q, k, causal, config), 1 / math.sqrt(D))
    torch.testing.assert_close(out, truth)


def test_scale_multiplies_the_logits():
    q, k, v = inputs(T=50)
    torch.testing.assert_close(
        hyper_attention(q * 3, k, v, True, config=LOCAL), hyper_attention(q, k, v, True, config=LOCAL, scale=0.75)
    )


@pytest.mark.parametrize("gap", [0.0, 100.0, -100.0, math.inf])
def test_merging(gap):
    out, lse = torch.randn(2, 3, 5), torch.randn(2, 3)
    merged, merged_lse = (out.clone(), lse.clone()) if gap < math.inf else (torch.zeros(2, 3, 5), lse - gap)
    part = out if gap == 0 else torch.randn(2, 3, 5)
    merge_(merged, merged_lse, part, lse + (gap if gap < math.inf else 0.0))
    if gap == 0:
        torch.testing.assert_close((merged, merged_lse), (out, lse + math.log(2)))
    elif gap < 0:
        assert torch.equal(merged_lse, lse)
        torch.testing.assert_close(merged, out)
    else:
        torch.testing.assert_close((merged, merged_lse), (part, lse + (100.0 if gap < math.inf else 0.0)))
