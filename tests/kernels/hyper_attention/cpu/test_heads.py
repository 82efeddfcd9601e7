"""The heads of a batch as views of its tensors."""

import torch

from kernels.hyper_attention.cpu.heads import heads_of


def test_a_head_is_a_view_of_its_group():
    q, k = torch.arange(36.0).view(2, 6, 3, 1), torch.arange(12.0).view(2, 2, 3, 1)
    found = heads_of(q, k, k + 0.5, -q, -q[..., 0], 1.0)
    assert [(head.row, head.key) for head in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    head = found[2]
    assert head.q.flatten().tolist() == list(range(18, 27))
    assert head.k.flatten().tolist() == [6, 7, 8]
    assert torch.equal(head.v, head.k + 0.5)
    assert torch.equal(head.out, -head.q)
    assert torch.equal(head.lse, head.out[..., 0])
