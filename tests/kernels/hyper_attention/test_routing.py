"""The path that a call takes is decided from tables, so the decision for a GPU can be tested without one."""

from contextlib import nullcontext
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


def test_the_longest_document_of_a_row_decides_not_the_row(card):
    card("sm_90")
    row = on_gpu(16_384)
    found = explain(row, row, True, config=NOMINATED, packed=True, longest=8192)
    assert found.path == "varlen"
    assert "the longest document = 8192 is at most the crossover" in found.reason
    assert explain(row, row, True, config=NOMINATED, packed=True, longest=15_000).path == "hyper_attention"
    compiled = explain(row, row, True, config=NOMINATED, packed=True, longest=8192, compiled=True)
    assert compiled.path == "hyper_attention"
    assert "own kernels are exact there" in compiled.reason


def test_a_long_row_of_short_documents_is_given_to_torch(monkeypatch):
    monkeypatch.setattr(routing, "_varlen", lambda q: object())
    given = []
    monkeypatch.setattr("kernels.hyper_attention.api.packed_exact_attention", lambda *inputs: given.append(inputs))
    q = torch.zeros(1, 1, 100, 16)
    config = HyperAttentionConfig(mode="causal_local", exact_below=60)
    hyper_attention(q, q, q, True, config=config, document_ids=torch.arange(2).repeat_interleave(50)[None])
    hyper_attention(q, q, q, True, config=config, cu_seqlens=torch.tensor([0, 60, 100]))
    assert len(given) == 2
    hyper_attention(q, q, q, True, config=config, cu_seqlens=torch.tensor([0, 61, 100]))
    assert len(given) == 2


def test_cudnn_is_first_only_for_lengths_that_recur(card):
    card("sm_90")
    odd, whole = on_gpu(5001), on_gpu(5120)
    assert isinstance(routing._fastest_first(odd, odd), nullcontext)
    assert not isinstance(routing._fastest_first(whole, whole), nullcontext)
    assert isinstance(routing._fastest_first(whole, odd), nullcontext)
    assert "torch's choice" in explain(odd, odd, True, config=NOMINATED).reason
    assert "cuDNN" in explain(whole, whole, True, config=NOMINATED).reason


def test_gpus_before_ampere_have_no_kernel_of_packed_documents(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for capability, there in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (routing._varlen(on_gpu(100)) is not None) == there


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


def test_ids_of_inference_mode_are_read_each_time_because_they_do_not_tell_of_changes():
    with torch.inference_mode():
        ids = torch.tensor([[0, 0, 0, -1]])
        assert routing._offsets(ids)[0].tolist() == [0, 3, 4]
        ids[0, 2] = 1
        assert routing._offsets(ids)[0].tolist() == [0, 2, 3, 4]


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
