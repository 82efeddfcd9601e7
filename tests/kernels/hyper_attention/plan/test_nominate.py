"""The nominations of queries and the lists of their tiles, compared with the definition computed row by row."""

from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.plan.nominate import build_nominated_plan, list_entries
from tests.kernels.hyper_attention.attention_samples import inputs

CONFIG = HyperAttentionConfig(mode="causal_local", window=32, segment=16, num_sinks=3, lookback=256, exact_below=64)
TOKENS, TILE = 700, 128
DOCUMENTS = torch.tensor([[0] * 300 + [1] * 50 + [2] * 350])


def plan_of(config, documents=None):
    q, k, _ = inputs(Hq=2, Hk=1, T=TOKENS, dtype=torch.float32)
    return q, k, build_nominated_plan(q, k, documents or whole(1, TOKENS, q.device), config)


@pytest.mark.parametrize("nominations", [1, 2])
def test_a_query_nominates_the_older_segments_whose_means_it_likes_best(nominations):
    q, k, plan = plan_of(replace(CONFIG, nominations=nominations))
    mean = torch.stack([k[0, 0, max(at, 3) : at + 16].mean(0) for at in range(0, TOKENS // 16 * 16, 16)])
    for head in range(2):
        for row in (0, 160, 300, 555, 699):
            older = int(plan.pooled.band.stop[0, row])
            best = (mean[:older] @ q[0, head, row]).topk(min(nominations, older)).indices.tolist()
            assert plan.chosen[0, head, row].tolist() == best + [-1] * (nominations - len(best))


@pytest.mark.parametrize("nominations", [1, 2])
@pytest.mark.parametrize("documents", [None, of_ids(DOCUMENTS)], ids=["whole", "packed"])
def test_a_row_reads_what_its_tile_so_far_and_the_tile_before_nominated(nominations, documents):
    _, _, plan = plan_of(replace(CONFIG, nominations=nominations), documents)
    read, segments = plan.lists.read(TOKENS // 16, 0), TOKENS // 16
    starts = [0] * TOKENS if documents is None else documents.start[0].tolist()
    for row in range(0, TOKENS, 7):
        if documents is not None and starts[row] == 300:  # 50 tokens: exact
            assert (read[0, :, row] == segments).all()
            continue
        tile = starts[row] + (row - starts[row]) // TILE * TILE
        named = plan.chosen[0, :, max(starts[row], tile - TILE) : row + 1]
        for head in range(2):
            wanted = set(named[head].flatten().tolist()) - {-1}
            assert set(read[0, head, row].tolist()) - {segments} == wanted


def test_a_full_list_drops_what_was_nominated_last():
    config = replace(CONFIG, lookback=32, nominations=1)
    _, _, plan = plan_of(config)
    entries = list_entries(config)
    assert plan.lists.segment.shape[-1] == entries == 12
    full = (plan.lists.segment < TOKENS // 16).all(-1)
    assert full.any()
    _, head, slot = full.nonzero()[-1].tolist()
    row = int(plan.lists.tiles.row[0, slot])
    order = dict.fromkeys(plan.chosen[0, head, row - TILE : row + TILE].flatten().tolist())
    assert plan.lists.segment[0, head, slot].tolist() == [name for name in order if name >= 0][:entries]
