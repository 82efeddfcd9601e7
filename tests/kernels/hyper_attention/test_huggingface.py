import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels.hyper_attention import HyperAttentionConfig, api, huggingface, routing
from kernels.hyper_attention.huggingface import patched_attention

EXACT = HyperAttentionConfig()
LOCAL = HyperAttentionConfig(
    mode="causal_local", choice="means", window=16, segment=8, num_sinks=3, lookback=16, exact_below=16
)
PAPER = HyperAttentionConfig(block_size=8, num_samples=4, num_projections=3, leaf=16, exact_below=16)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 512,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def families():
    yield llama
    yield lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16))
    yield lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None))
    yield lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


@pytest.fixture(params=families(), ids=["llama", "qwen3", "mistral", "gpt_neox"])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


TOKENS = torch.randint(0, 99, (2, 600), generator=torch.Generator().manual_seed(0))[:, :300]


def logits(model, **more):
    with torch.no_grad():
        return model(TOKENS, **more).logits


def test_below_the_limit_it_is_exact(model):
    before = logits(model)
    with patched_attention(model, EXACT):
        torch.testing.assert_close(logits(model), before)
    assert torch.equal(logits(model), before)


def test_above_the_limit_it_is_not_and_the_model_is_restored(model):
    before = logits(model)
    for config in (LOCAL, PAPER):
        with patched_attention(model, config, "last:2") as layers:
            assert layers == [2, 3]
            assert not torch.allclose(logits(model), before, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == "sdpa"
    assert not any("hyper_attention" in vars(module) for module in model.modules())


@pytest.mark.parametrize("config", [EXACT, LOCAL, PAPER], ids=["exact", "local", "paper"])
def test_packed_sequences_are_alone(model, config):
    position_ids = torch.cat([torch.arange(n) for n in (70, 200, 30)])[None].expand(2, -1)
    with patched_attention(model, config):
        packed = logits(model, position_ids=position_ids, use_cache=False)
        with torch.no_grad():
            alone = [model(part).logits for part in TOKENS.split([70, 200, 30], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [EXACT, LOCAL], ids=["exact", "local"])
def test_padding_changes_nothing(model, config, side):
    mask = torch.ones_like(TOKENS)
    mask[0, slice(0, 40) if side == "left" else slice(260, 300)] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with patched_attention(model, config):
        padded = logits(model, attention_mask=mask, position_ids=position_ids)
        with torch.no_grad():
            alone = model(TOKENS[:1][mask[:1].bool()][None]).logits[0]
    torch.testing.assert_close(padded[0][mask[0].bool()], alone, atol=1e-4, rtol=1e-4)
    assert padded.isfinite().all()


def test_padding_inside_a_document_does_not_split_it(model):
    mask = torch.ones_like(TOKENS)
    mask[0, 100:140] = 0
    seen = mask.bool()
    before = logits(model, attention_mask=mask)
    with patched_attention(model, LOCAL):
        torch.testing.assert_close(logits(model, attention_mask=mask)[seen], before[seen])


def test_padding_between_documents_needs_no_mask_of_pairs():
    documents = torch.tensor([[0] * 4 + [1] * 4])
    arguments = {"batch_size": 1, "q_length": 8, "kv_length": 8}

    def ids(holes):
        seen = torch.ones(1, 8, dtype=torch.bool)
        seen[0, holes] = False
        return huggingface._mask(**arguments, mask_function=within, attention_mask=seen)

    def within(batch, head, query, key):
        return (documents[0, query] == documents[0, key]) & (key <= query)

    assert ids([0, 3, 4, 7]).tolist() == [[-1, 0, 0, -1, -1, 1, 1, -1]]
    assert ids([2]).shape == (1, 1, 8, 8)


def test_layers_share_the_offsets_of_a_padded_batch_in_inference_mode(monkeypatch):
    """A substitute for torch's kernel, which a CPU lacks; on a GPU the host waits each time that it reads offsets."""
    kept = []

    def exact(q, k, v, ids, causal, scale):
        kept.append(routing._offsets(ids)[0])
        return torch.zeros_like(q)

    monkeypatch.setattr(routing, "_varlen", lambda q: object())
    monkeypatch.setattr(api, "packed_exact_attention", exact)
    mask = torch.ones_like(TOKENS)
    mask[0, 260:] = 0
    model = llama().eval()
    with torch.inference_mode(), patched_attention(model, EXACT):
        model(TOKENS, attention_mask=mask)
    assert len(kept) == 4
    assert all(offsets is kept[0] for offsets in kept)


def test_decoding_with_a_cache_is_exact(model):
    with torch.no_grad():
        plain = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
        mask = torch.ones_like(TOKENS)
        mask[0, :7] = 0
        padded = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
        with patched_attention(model, EXACT):
            assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), plain)
            mine = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
            assert torch.equal(mine, padded)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ("first:1", [0]), ("last:0", []), ("even", [0, 2]), ("odd", [1, 3]), ([3, 1], [1, 3])],
)
def test_layers_are_chosen(layers, expected):
    with patched_attention(llama(), LOCAL, layers) as chosen:
        assert chosen == expected


@pytest.mark.parametrize(
    ("layers", "message"), [("last:5", "has 4 layers"), ([4], "0 to 3"), ("middle", "last:n"), ("last:-1", "last:n")]
)
def test_layers_that_do_not_exist_are_refused(layers, message):
    with pytest.raises(ValueError, match=message), patched_attention(llama(), LOCAL, layers):
        pass
    with pytest.raises(ValueError, match="no attention module"), patched_attention(torch.nn.Linear(2, 2), LOCAL):
        pass


def test_an_exception_restores_the_model():
    model = llama()
    with pytest.raises(KeyError), patched_attention(model, LOCAL):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_from_pretrained_takes_it(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    model.config.hyper_attention = dataclasses.asdict(LOCAL)
    model.save_pretrained(tmp_path)
    with patched_attention(model, LOCAL):
        expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hyper_attention")
    assert torch.equal(logits(loaded.eval()), expected)


def test_a_sliding_window_stays_exact():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=50)).eval()
    before = logits(model)
    with patched_attention(model, LOCAL):
        torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("kind", ["latent", "wide"])
def test_heads_that_do_not_fit_stay_exact(kind):
    torch.manual_seed(0)
    if kind == "latent":
        heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 8}
        config = DeepseekV2Config(**SIZES, **heads, q_lora_rank=None, n_routed_experts=4, first_k_dense_replace=4)
    else:
        config = Qwen3Config(**GROUPED, head_dim=260)
    model = AutoModelForCausalLM.from_config(config).eval()
    position_ids = torch.cat([torch.arange(n) for n in (70, 230)])[None].expand(2, -1)
    mask = torch.ones_like(TOKENS)
    mask[0, :40] = 0
    calls = ({"position_ids": position_ids, "use_cache": False}, {"attention_mask": mask}, {})
    before = [logits(model, **call) for call in calls]
    with patched_attention(model, LOCAL, "last:2"):
        for call, expected in zip(calls, before, strict=True):
            seen = call.get("attention_mask", torch.ones_like(TOKENS)).bool()
            torch.testing.assert_close(logits(model, **call)[seen], expected[seen])


def test_dropout_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, attention_dropout=0.1)).train()
    with patched_attention(model, LOCAL), pytest.raises(ValueError, match=r"dropout is 0\.1"):
        model(TOKENS)


def test_it_trains_with_checkpointing_as_without():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with patched_attention(model, LOCAL):
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
