"""Means of segments and their gradients, compared with explicit sums."""

import torch

from kernels.hyper_attention.plan.pooling import add_pooled_gradient_, log_counts, pool
from kernels.hyper_attention.plan.tables import Band, Pooled

_BAND = Band(*(torch.zeros(1, 1, dtype=torch.int32) for _ in range(2)), keys=3)
POOLED = Pooled(_BAND, torch.tensor([[0, 4, 8]], dtype=torch.int32), torch.tensor([[3, 0, 1]], dtype=torch.int32), 4)
TOKENS = [[3], [4, 5, 6, 7], [9, 10, 11]]  # of each segment, without its sinks


def test_a_mean_leaves_out_the_sinks_of_its_segment():
    x = torch.randn(1, 2, 14, 5, dtype=torch.float64)
    means = pool(x, POOLED)
    for segment, tokens in enumerate(TOKENS):
        torch.testing.assert_close(means[:, :, segment], x[:, :, tokens].mean(2))
    torch.testing.assert_close(log_counts(POOLED).exp(), torch.tensor([[1.0, 4.0, 3.0]]))


def test_the_gradient_of_a_mean_is_shared_by_its_tokens():
    x = torch.randn(1, 2, 14, 5, dtype=torch.float64, requires_grad=True)
    grad_means = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    [expected] = torch.autograd.grad(pool(x, POOLED), x, grad_means)
    gradient = torch.ones(1, 2, 14, 5, dtype=torch.float64)
    add_pooled_gradient_(gradient, grad_means, POOLED)
    torch.testing.assert_close(gradient, 1 + expected)
