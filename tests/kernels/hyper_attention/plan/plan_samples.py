"""Queries, keys and packed documents that the plans of both modes are built for in the tests."""

import torch

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
