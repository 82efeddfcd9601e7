"""The path of the benchmarks' yardsticks, which is plain torch, run on a CPU: it equals the CPU path."""

import pytest
import torch

from kernels.hyper_attention.cpu import attention as cpu_attention
from kernels.hyper_attention.gpu import dense
from tests.kernels.hyper_attention.attention_samples import CHOOSE, LOOK, PACKED, inputs, plan_of

pytestmark = pytest.mark.usefixtures("small_steps")


@pytest.mark.parametrize("config", [CHOOSE, LOOK])
@pytest.mark.parametrize("ids", [None, PACKED])
def test_dense_pieces_equal_the_cpu_path(config, ids, monkeypatch):
    monkeypatch.setattr(dense, "_ELEMENTS", 20000)
    q, k, v = (x.detach() for x in inputs(2, 4, 2, 137, D=16))
    plan = plan_of(q, k, True, config, ids)
    mine, truth = dense.forward(q, k, v, plan, 0.3), cpu_attention.forward(q, k, v, plan, 0.3)
    torch.testing.assert_close(mine, truth)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in truth]
    found = [path.backward(*grads, q, k, v, *truth, plan, 0.3) for path in (dense, cpu_attention)]
    torch.testing.assert_close(*found)
