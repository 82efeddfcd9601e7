"""The segments of the recursion: halves of documents, and which queries read which keys."""

import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.segments import numbered, split_documents
from kernels.hyper_attention.plan.tables import build_plan
from tests.kernels.hyper_attention.plan.plan_samples import SMALL, inputs


def test_causal_tiles_recurse_by_halves():
    q, k = inputs(1, 1, 1, 64, 64)
    config = HyperAttentionConfig(**{**SMALL, "block_size": 64})
    plan = build_plan(q, k, True, whole(1, 64, q.device), config)
    bounds = [level.segments[0].tolist() for level in plan.levels]
    assert bounds == [[[0, 16, 16, 32], [32, 48, 48, 64]], [[0, 32, 32, 64]]]
    assert torch.equal(plan.band.start[0], torch.arange(64, dtype=torch.int32) // 16 * 16)


def test_each_long_document_is_one_segment_that_its_own_queries_read():
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 10, 24]))[None]
    split = split_documents(of_ids(ids), 64, HyperAttentionConfig(**SMALL))
    assert split.segments[0, :2].tolist() == [[0, 30, 0, 30], [40, 64, 40, 64]]
    assert split.segment[0].tolist() == [0] * 30 + [-1] * 10 + [1] * 24
    assert torch.equal(split.is_key, split.segment >= 0)
    assert (split.group.diff() >= 0).all()


def test_marks_are_numbered_and_found_again():
    marks = torch.zeros(2, 9, dtype=torch.bool)
    marks[0, [2, 5]] = marks[1, [0]] = True
    index, table = numbered(marks, 3)
    assert index.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, 1], [0] * 9]
    assert table.tolist() == [[2, 5, 9], [0, 9, 9]]
