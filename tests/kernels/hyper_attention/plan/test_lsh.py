"""Buckets of sign bits, numbered so that neighbours differ in one sign (Gray code), and counter-based draws."""

import pytest
import torch

from kernels.hyper_attention.plan.lsh import (
    _GOLDEN,
    PROJECTIONS,
    SAMPLES,
    _mix,
    _signed,
    gray_buckets,
    initial_state,
    uniform,
)


def test_neighbouring_buckets_differ_in_one_sign():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)[None, None]
    buckets = gray_buckets(signs, torch.eye(4)[None], 1).flatten()
    assert sorted(buckets.tolist()) == list(range(16))
    ordered = signs[0, 0, buckets.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()


def test_draws_are_uniform_independent_of_order_and_differ_by_stream_and_seed():
    index = torch.arange(20_000)
    drawn = uniform(7, SAMPLES, index)
    assert drawn.dtype == torch.float64
    assert 0 < drawn.min() < 0.001
    assert 0.999 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01
    order = torch.randperm(20_000)
    assert torch.equal(uniform(7, SAMPLES, index[order]), drawn[order])
    for seed, stream in ((7, PROJECTIONS), (8, SAMPLES)):
        assert abs(torch.corrcoef(torch.stack([drawn, uniform(seed, stream, index)]))[0, 1]) < 0.03


@pytest.mark.parametrize("seed", [0, 12, -(2**63), 2**63 - 1])
def test_the_initial_state_in_a_kernel_equals_that_of_the_tensors(seed):
    word = torch.tensor(_signed((seed * 2 + 1) * _GOLDEN + SAMPLES))
    assert initial_state(seed, SAMPLES) == int(_mix(word))
