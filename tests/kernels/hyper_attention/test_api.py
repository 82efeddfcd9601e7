"""Results and gradients of the public function on a CPU, compared with the reference and with exact attention."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention
from kernels.hyper_attention.cpu import attention as cpu_attention
from kernels.hyper_attention.plan.lsh import projections
from kernels.hyper_attention.reference import reference_attention
from tests.kernels.hyper_attention.attention_samples import (
    ALL_MODES,
    CHOOSE,
    EXACT,
    LOCAL,
    LOOK,
    NOMINATE,
    PACKED,
    PAPER,
    gradients,
    inputs,
    plan_of,
)

pytestmark = pytest.mark.usefixtures("small_steps")

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
    (1, 2, 1, 300, 300, 16, True, NOMINATE, None),
    (2, 4, 2, 100, 137, 20, True, NOMINATE, None),
    (1, 2, 1, 1, 100, 16, True, NOMINATE, None),
    (1, 1, 1, 1, 1, 16, True, NOMINATE, None),
    (2, 4, 2, 137, 137, 16, True, NOMINATE, PACKED),
]


@pytest.mark.parametrize(("B", "Hq", "Hk", "T", "S", "D", "causal", "config", "ids"), CASES)
def test_the_cpu_path_equals_the_reference(B, Hq, Hk, T, S, D, causal, config, ids):
    tensors = inputs(B, Hq, Hk, T, S, D)
    mine = hyper_attention(*tensors, causal, config=config, document_ids=ids, return_lse=True)
    plan = plan_of(*tensors[:2], causal, config, ids)
    truth = reference_attention(*tensors, plan, 1 / math.sqrt(D))
    torch.testing.assert_close(mine, truth)
    torch.testing.assert_close(gradients(mine, tensors), gradients(truth, tensors))
    torch.testing.assert_close(gradients(mine[:1], tensors), gradients(truth[:1], tensors))


@pytest.mark.parametrize(
    ("causal", "config"), [(False, PAPER), (True, PAPER), (True, LOCAL), (True, LOOK), (True, CHOOSE), (True, NOMINATE)]
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
        out, lse = cpu_attention.forward(q, k, v, plan, 0.3)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *cpu_attention.backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.plan, 0.3), None


def test_a_detached_log_sum_exp_is_noticed():
    """The authors' code detaches it in half precision; the comparison above must tell this from the true gradient."""
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
        HyperAttentionConfig(
            mode="causal_local", choice="means", window=16, segment=1, num_sinks=0, lookback=0, exact_below=16
        ),
        HyperAttentionConfig(
            mode="causal_local", choice="means", window=16, segment=8, num_sinks=3, lookback=128, exact_below=16
        ),
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


@pytest.mark.parametrize(("config", "causal"), ALL_MODES)
def test_values_of_one_stay_one(config, causal):
    q, k, v = inputs(T=111)
    out = hyper_attention(q, k, torch.ones_like(v), causal, config=config)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize(("config", "causal"), ALL_MODES)
@pytest.mark.parametrize("size", [1e3, 1e-30, 0.0])
def test_extreme_logits_stay_finite(config, causal, size):
    tensors = inputs(T=100, dtype=torch.float32)
    tensors[0].data *= size
    outputs = hyper_attention(*tensors, causal, config=config, return_lse=True)
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, tensors)))


@pytest.mark.parametrize(("config", "causal"), ALL_MODES)
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


@pytest.mark.parametrize(("config", "causal"), ALL_MODES)
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
