"""Documents of a packed row, from ids or from cumulative lengths."""

import torch

from kernels.hyper_attention.documents import ids_of_cu_seqlens, of_ids


def test_documents_of_ids_and_of_offsets():
    ids = ids_of_cu_seqlens(torch.tensor([0, 3, 3, 7]), 9)
    assert ids.tolist() == [[0, 0, 0, 2, 2, 2, 2, -1, -1]]
    documents = of_ids(ids)
    assert documents.start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 8]]
    assert documents.stop.tolist() == [[3, 3, 3, 7, 7, 7, 7, 7, 8]]
