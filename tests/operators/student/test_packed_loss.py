"""The loss of a pack is the sum over its documents' supervised tokens, whatever is packed beside them."""

import pytest
import torch
import transformers as tf
from torch.nn.functional import cross_entropy

from operators.student.hyper_layers import hyper_attention_layers
from operators.student.packed_attention import PerHeadError, packed_attention, replaced_attention
from operators.student.packed_documents import Pack, joined, padded
from operators.student.packed_loss import load_trainable, summed_loss
from operators.student.packing_probe import probe_packing


def pack_of(*lengths, seed=0, supervised=True):
    tokens = torch.randint(100, 40_000, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).tolist()
    labels, at = list(tokens), 0
    for length in lengths:
        labels[at] = -100
        at += length
    return Pack(tokens, labels if supervised else [-100] * len(tokens), list(lengths), list(range(len(lengths))))


@pytest.fixture(scope="module")
def student(tiny_model):
    return load_trainable(tiny_model, torch.float32)


def plain_loss(student, pack):
    """The loss from transformers' own forward pass, one document after the other."""
    total, at = torch.zeros(()), 0
    for length in pack.document_lengths:
        ids, labels = (torch.tensor(values[at : at + length]) for values in (pack.input_ids, pack.labels))
        logits = student.lm_head(student.model(ids[None], attention_mask=torch.ones(1, length)).last_hidden_state)
        total = total + cross_entropy(logits[0, :-1].float(), labels[1:], reduction="sum", ignore_index=-100)
        at += length
    return total


def test_a_pack_costs_what_its_documents_cost_alone(student):
    pack = pack_of(30, 50, 1, 20)
    torch.testing.assert_close(summed_loss(student, pack), plain_loss(student, pack), rtol=1e-5, atol=1e-4)
    parts = [summed_loss(student, pack_of(30, seed=1)), summed_loss(student, pack_of(50, seed=2))]
    both = joined([pack_of(30, seed=1), pack_of(50, seed=2)])
    torch.testing.assert_close(summed_loss(student, both), sum(parts), rtol=1e-5, atol=1e-4)


def test_a_pack_without_a_supervised_token_costs_nothing_but_has_a_gradient(student):
    for pack in (pack_of(12, supervised=False), Pack([5], [-100], [], [])):
        loss = summed_loss(student, pack)
        assert loss.item() == 0
        loss.backward()
        assert not student.get_input_embeddings().weight.grad.any()


def test_dummies_leave_no_trace_beside_packs():
    dummy, pack = Pack([5], [-100], [], []), pack_of(4, 3)
    assert joined([dummy, pack, dummy]) == pack
    assert joined([dummy, dummy]) == dummy


def test_a_student_whose_forward_pass_makes_every_logit_is_refused(tiny_model, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids: None)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM of student .* takes no logits_to_keep; use another"):
        load_trainable(tiny_model, torch.float32)


def test_slices_of_a_pack_cost_what_the_pack_costs_if_attention_connects_nothing(student):
    def nothing(module, query, key, value, *_, **__):
        return torch.zeros_like(query).transpose(1, 2), None

    pack = padded(pack_of(30, 50, 1, 20), 4)
    with replaced_attention("packed_documents", nothing, lambda *_, **__: None):
        slices = [summed_loss(student, pack, place=place, count=4) for place in range(4)]
        torch.testing.assert_close(sum(slices), summed_loss(student, pack), rtol=1e-5, atol=1e-4)
    assert slices[0] != slices[1]


def test_padding_costs_nothing_and_is_read_by_no_document(student):
    pack = pack_of(30, 20)
    torch.testing.assert_close(summed_loss(student, padded(pack, 64)), summed_loss(student, pack), rtol=1e-5, atol=1e-4)


def test_a_student_with_sinks_is_trained_with_them_and_the_probe_sees_that_its_documents_mix(tmp_path):
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=40_000, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made = tf.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    made.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    pack, student = pack_of(30), load_trainable(str(tmp_path), torch.float32)
    found = summed_loss(student, pack)
    torch.testing.assert_close(found, plain_loss(plain, pack), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.sinks.fill_(-30)
    assert abs(plain_loss(plain, pack).item() / found.item() - 1) > 1e-4, "the sinks count"
    assert probe_packing(student).leaks, "transformers tells its mask no positions"
    with pytest.raises(ValueError, match="the attention of a gpt_oss student has sinks, which HyperAttention cannot"):
        hyper_attention_layers(config, "all")


def test_attention_that_would_leave_out_a_sink_or_a_bias_is_refused():
    tensors = [torch.zeros(1, 2, 4, 8)] * 3
    with pytest.raises(PerHeadError, match="Linear gives attention s_aux, with a value for each head"):
        packed_attention(torch.nn.Linear(1, 1), *tensors, None, s_aux=torch.zeros(2))
