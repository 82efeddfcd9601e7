"""Tiles of documents: each query of a long document is in exactly one tile, the same as if the document were alone."""

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.tiles import TILE, TileLists, cut_tiles

CONFIG = HyperAttentionConfig(mode="causal_local", window=32, segment=16, exact_below=64)
LENGTHS = (300, 50, 350)  # the middle one is exact
PACKED = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]


@pytest.mark.parametrize(
    ("documents", "bounds"),
    [(whole(1, 700, torch.device("cpu")), [(0, 700)]), (of_ids(PACKED), [(0, 300), (350, 700)])],
)
def test_tiles_begin_at_their_document_and_cover_it_once(documents, bounds):
    tiles = cut_tiles(documents, 700, CONFIG)
    used = tiles.row[0] < 700
    spans = sorted(zip(tiles.row[0, used].tolist(), tiles.stop[0, used].tolist(), strict=True))
    assert spans == [(at, min(at + TILE, end)) for start, end in bounds for at in range(start, end, TILE)]
    for position, slot in enumerate(tiles.slot[0].tolist()):
        if slot < 0:
            assert 300 <= position < 350, "only the short document is exact"
        else:
            assert tiles.row[0, slot] <= position < tiles.stop[0, slot]
            assert tiles.start[0, slot] == documents.start[0, position]


def test_a_tile_knows_the_tile_before_it_and_what_lies_before_its_window():
    tiles = cut_tiles(of_ids(PACKED), 700, CONFIG)
    for slot in (tiles.row[0] < 700).nonzero()[:, 0].tolist():
        local = int(tiles.row[0, slot] - tiles.start[0, slot])
        assert tiles.older[0, slot] == max(local - 32, 0) // 16 * 16
        before = int(tiles.before[0, slot])
        assert (before < 0) == (local == 0)
        if before >= 0:
            assert tiles.row[0, before] == tiles.row[0, slot] - TILE


def test_the_last_queries_have_the_tiles_that_they_have_among_all():
    every, last = (cut_tiles(whole(1, 700, torch.device("cpu")), queries, CONFIG) for queries in (700, 150))
    for query in range(150):
        slots = int(every.slot[0, 550 + query]), int(last.slot[0, query])
        assert every.row[0, slots[0]] == last.row[0, slots[1]]


def test_a_row_reads_an_entry_from_the_row_on_that_nominated_it():
    tiles = cut_tiles(whole(1, 256, torch.device("cpu")), 256, CONFIG)
    segment = torch.tensor([5, 3, 16], dtype=torch.int32).expand(1, 1, tiles.row.shape[1], 3)
    first = torch.tensor([0, 100, TILE], dtype=torch.int32).expand_as(segment)
    read = TileLists(tiles, segment, first).read(16, 0)[0, 0]
    assert read[128 + 99].tolist() == [5, 16, 16]
    assert read[128 + 100].tolist() == [5, 3, 16]
