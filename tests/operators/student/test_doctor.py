"""Students from practice, each checked before the first teacher call."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GraniteConfig,
    MistralConfig,
)

from operators.student.doctor import StudentNeeds, examine_student

NEEDS = StudentNeeds(max_tokens=256)


@pytest.fixture
def student(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_tokenizer(student: Path, spoil) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    spoil(tokenizer)
    tokenizer.save_pretrained(student)


def only(findings):
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def test_a_good_student_has_no_finding(tiny_model, demo_model):
    assert examine_student(tiny_model, replace(NEEDS, neftune_alpha=5)) == []
    assert examine_student(demo_model, StudentNeeds(max_tokens=2048, hyper_attention_layers="last:4")) == []


def test_weights_that_are_a_pickle_are_refused(student):
    torch.save(load_file(student / "model.safetensors"), student / "pytorch_model.bin")
    (student / "model.safetensors").unlink()
    finding = only(examine_student(str(student), NEEDS))
    assert finding.fatal
    assert "only pytorch_model.bin" in finding.text
    assert "save_pretrained" in finding.text


def test_missing_and_half_copied_weights_are_refused(student):
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be read" in only(examine_student(str(student), NEEDS)).text
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors" in only(examine_student(str(student), NEEDS)).text


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_where_they_are_used(student):
    turn = "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content + '<|stop|>\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"

    def grow(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
        tokenizer.chat_template = turn + prompt

    save_tokenizer(student, grow)
    fatal = [finding for finding in examine_student(str(student), NEEDS) if finding.fatal]
    assert "2 tokens (<|stop|>, <|turn|>) beyond the 49152 rows of the embeddings" in only(fatal).text


def test_control_tokens_that_are_never_written_may_lie_beyond_the_embeddings(student):
    save_tokenizer(student, lambda t: t.add_special_tokens({"additional_special_tokens": ["<|image|>"]}))
    finding = only(examine_student(str(student), NEEDS))
    assert not finding.fatal
    assert "<|image|>" in finding.text


def test_packs_longer_than_the_positions_are_refused(student):
    finding = only(examine_student(str(student), StudentNeeds(max_tokens=4096)))
    assert (finding.key, finding.fatal) == ("pack.max_tokens", True)
    assert "4096 tokens" in finding.text
    assert "2048 positions" in finding.text


def test_templates_are_refused_in_one_line(student):
    (student / "chat_template.jinja").write_text("{{ raise_exception('this template needs tools') }}")
    finding = only(examine_student(str(student), NEEDS))
    assert finding.fatal
    assert "this template needs tools" in finding.text
    assert "\n" not in finding.text
    (student / "chat_template.jinja").unlink()
    assert "no chat template" in only(examine_student(str(student), NEEDS)).text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("Hello", "writes no response"),
    ],
)
def test_a_template_of_the_configuration_that_cannot_write_a_dialogue_is_named_by_its_file(student, text, told):
    finding = only(examine_student(str(student), replace(NEEDS, chat_template=text, template_file="mine.jinja")))
    assert finding.fatal
    assert finding.key == "student.chat_template"
    assert finding.text.startswith("mine.jinja: ")
    assert told in finding.text
    assert "mend the file, or leave out the key" in finding.text
    assert "\n" not in finding.text


def test_a_template_of_the_configuration_serves_a_student_without_one(student, own_template):
    (student / "chat_template.jinja").unlink()
    assert examine_student(str(student), replace(NEEDS, chat_template=own_template)) == []
    (student / "tokenizer.json").unlink()
    finding = only(examine_student(str(student), replace(NEEDS, chat_template=own_template)))
    assert finding.key == "student.model", "a tokenizer that is missing is no fault of the template"


def test_a_generation_config_that_cannot_be_saved_is_reported_with_its_replacement(student):
    edit(student / "generation_config.json", temperature=0.9, top_p=0.6, do_sample=False)
    finding = only(examine_student(str(student), NEEDS))
    assert not finding.fatal
    assert "exported with do_sample: true" in finding.text


def test_a_base_student_whose_answers_would_not_stop_is_reported_with_the_cure(student):
    save_tokenizer(student, lambda t: setattr(t, "eos_token", "<|endoftext|>"))
    edit(student / "generation_config.json", eos_token_id=0, pad_token_id=0)
    finding = only(examine_student(str(student), NEEDS))
    assert not finding.fatal
    assert (
        "'<|im_end|>', where its answers do not stop; the student is exported with eos_token_id [2, 0]" in finding.text
    )


def test_a_family_whose_documents_leak_is_refused_unless_each_is_trained_alone(student):
    config = FalconConfig(vocab_size=49152, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(student)
    finding = only([finding for finding in examine_student(str(student), NEEDS) if finding.fatal])
    assert finding.key == "pack.packed"
    assert "falcon" in finding.text
    alone = StudentNeeds(max_tokens=256, packed=False)
    assert not [finding for finding in examine_student(str(student), alone) if finding.fatal]


@pytest.mark.parametrize(
    ("kind", "own", "fatal", "words"),
    [
        (GraniteConfig, {"embedding_multiplier": 12.0}, False, "by 12; the noise is divided by this factor"),
        (GemmaConfig, {"head_dim": 32}, False, "by 8; the noise has the norm alpha / sqrt(3) at the first layer"),
        (BloomConfig, {}, True, "does more than multiply by a constant"),
    ],
)
def test_a_student_that_scales_its_embeddings_is_found_if_noise_is_configured(student, kind, own, fatal, words):
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**sizes, intermediate_size=128, **own)).save_pretrained(student)
    noisy = StudentNeeds(max_tokens=256, packed=False, neftune_alpha=5)
    finding = only([one for one in examine_student(str(student), noisy) if one.key == "train.neftune_alpha"])
    assert (finding.fatal, words in finding.text) == (fatal, True), finding.text
    quiet = StudentNeeds(max_tokens=256, packed=False)
    assert not [one for one in examine_student(str(student), quiet) if one.key == "train.neftune_alpha"]


def test_hyper_attention_that_no_layer_would_use_is_refused(student):
    config = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    mistral = MistralConfig(**config, num_hidden_layers=2, num_key_value_heads=1, sliding_window=64)
    AutoModelForCausalLM.from_config(mistral).save_pretrained(student)
    edit(student / "generation_config.json", eos_token_id=2)
    needs = StudentNeeds(max_tokens=256, hyper_attention_layers="all")
    finding = only(examine_student(str(student), needs))
    assert finding.fatal
    assert "0 of 2 layers would use HyperAttention" in finding.text
    assert examine_student(str(student), NEEDS) == []


def test_hyper_attention_layers_that_do_not_exist_are_refused(tiny_model):
    finding = only(examine_student(tiny_model, StudentNeeds(max_tokens=256, hyper_attention_layers="last:3")))
    assert finding.fatal
    assert "has 2 layers" in finding.text


def test_a_student_whose_packs_cannot_be_shared_is_refused(tiny_model, demo_model, student):
    shared = StudentNeeds(max_tokens=256, sequence_parallel=2)
    assert examine_student(tiny_model, shared) == []
    finding = only(examine_student(demo_model, shared))
    assert finding.fatal
    assert str(finding).startswith("train.sequence_parallel: 2 workers cannot divide the 9 heads")
    edit(student / "config.json", attention_dropout=0.1)
    assert "the student has dropout" in only(examine_student(str(student), shared)).text


def test_no_configuration_is_one_line(tmp_path):
    finding = only(examine_student(str(tmp_path), NEEDS))
    assert finding.fatal
    assert "no usable config.json" in finding.text
