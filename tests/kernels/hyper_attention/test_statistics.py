"""The paper's estimator as a random variable: its denominator is unbiased, and more samples are closer."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention
from tests.kernels.hyper_attention.attention_samples import inputs


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
