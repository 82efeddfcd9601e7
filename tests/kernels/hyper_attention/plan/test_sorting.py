"""A stable order by counting equals torch's stable sort."""

import pytest
import torch

from kernels.hyper_attention.plan.sorting import stable_order


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
