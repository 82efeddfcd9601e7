"""The path that a call takes is decided from tables, so the decision for a GPU can be tested without one."""

from types import SimpleNamespace

import pytest
import torch

from kernels.hyper_attention import HyperAttentionConfig, explain, hyper_attention, routing
from kernels.hyper_attention.crossovers import crossover

NOMINATED = HyperAttentionConfig(mode="causal_local", choice="nominated", segment=64)


def on_gpu(tokens, heads=8, size=64, dtype=torch.bfloat16):
    return SimpleNamespace(shape=(1, heads, tokens, size), device=torch.device("cuda", 0), dtype=dtype)


@pytest.fixture
def card(monkeypatch):
    """Set the GPU's name, which torch would otherwise ask the driver for."""

    def named(name, varlen=True):
        monkeypatch.setattr(routing, "_card", lambda device: name)
        monkeypatch.setattr(routing, "_varlen", lambda q: object() if varlen else None)

    return named


def test_short_calls_on_hopper_are_exact_and_long_ones_are_not(card):
    card("sm_90")
    limit = crossover("sm_90", "nominated", 64, 1, True).tokens
    short, long = on_gpu(limit), on_gpu(limit + 1)
    found = explain(short, short, True, config=NOMINATED)
    assert (found.path, found.exact_below) == ("sdpa", limit)
    assert "cuDNN" in found.reason
    assert str(limit) in str(found)
    assert explain(long, long, True, config=NOMINATED).path == "hyper_attention"
    assert explain(short, short, True, config=NOMINATED, packed=True).path == "varlen"
    assert explain(short, short, True, config=NOMINATED, return_lse=True).path == "hyper_attention"
    assert explain(on_gpu(5), short, True, config=NOMINATED).path == "hyper_attention"
    card("sm_90", varlen=False)
    assert explain(short, short, True, config=NOMINATED, packed=True).path == "hyper_attention"


def test_a_number_fixes_the_length(card):
    card("sm_90")
    q = on_gpu(2000)
    for below, path in ((1999, "hyper_attention"), (2000, "sdpa")):
        found = explain(q, q, True, config=HyperAttentionConfig(exact_below=below))
        assert (found.path, found.exact_below) == (path, below)


def test_a_cpu_is_exact_up_to_4096():
    q = torch.zeros(1, 1, 4096, 16)
    assert explain(q, q, True).path == "sdpa"
    longer = torch.zeros(1, 1, 4097, 16)
    found = explain(longer, longer, True)
    assert (found.path, found.exact_below) == ("hyper_attention", 4096)
    assert "the default on a cpu" in found.reason


def test_a_crossover_of_another_card_is_marked_in_the_reason(card):
    card("sm_80")
    q = on_gpu(100)
    assert "the longest known, since sm_80 has none" in explain(q, q, True, config=NOMINATED).reason


def test_offsets_of_packed_documents_are_kept_for_the_next_layer():
    ids = torch.tensor([[0, 0, 0, 2, 2, -1], [1, 1, 4, 4, 4, 4]])
    offsets, longest = routing._offsets(ids)
    assert offsets.tolist() == [0, 3, 5, 6, 8, 12]
    assert longest == 4
    assert routing._offsets(ids)[0] is offsets
    ids[0, 5] = 2
    assert routing._offsets(ids)[0].tolist() == [0, 3, 6, 8, 12]


def test_packed_exact_attention_is_exact_inside_each_document(monkeypatch):
    """A substitute takes the place of torch's kernel, which a CPU lacks, with the arguments of torch 2.10 and later."""

    def varlen(q, k, v, offsets, offsets_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
        assert torch.equal(offsets, offsets_k)
        assert longest == longest_k == int(offsets.diff().max())
        outs = []
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            causal = window_size == (-1, 0)
            outs.append(
                routing.scaled_dot_product_attention(*one, is_causal=causal, scale=scale, enable_gqa=enable_gqa)
            )
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    monkeypatch.setattr(routing, "_varlen", lambda q: varlen)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 10 + [1] * 25 + [-1] * 5, [3] * 40])
    for causal in (True, False):
        mine = routing.packed_exact_attention(q, k, v, ids, causal, 0.25)
        config = HyperAttentionConfig(exact_below=64)
        truth = hyper_attention(q, k, v, causal, config=config, scale=0.25, document_ids=ids, return_lse=True)
        torch.testing.assert_close(mine, truth[0])
