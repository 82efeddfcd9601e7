"""A flipped bit in a student's weights is found, and named with the cure."""

from pathlib import Path

import pytest

from cluster.files import StorageError
from flows.student_files import CHECKSUMS, damage_of, note_checksums, require_undamaged
from operators.files.atomic import put_file

FILES = {"config.json": "{}", "model.safetensors": "weights", "adapter/adapter_model.safetensors": "more"}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    for name, text in {**FILES, "checkpoints/step_1/a.json": "{}", "metrics.jsonl": "{}"}.items():
        put_file(f"{tmp_path}/{name}", text)
    note_checksums(str(tmp_path))
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_an_undamaged_student_has_nothing_to_tell_and_checkpoints_do_not_count(student: Path) -> None:
    assert damage_of(str(student)) == ""
    flip(student / "checkpoints" / "step_1" / "a.json")
    assert damage_of(str(student)) == ""


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_also_after_the_training_was_asked_for_again(student: Path, name: str) -> None:
    flip(student / name)
    note_checksums(str(student))
    with pytest.raises(StorageError, match=rf"student: {student}: {name} are not what the training wrote; restore"):
        require_undamaged(str(student))


def test_a_file_that_is_gone_is_found(student: Path) -> None:
    (student / "model.safetensors").unlink()
    assert "model.safetensors are not what the training wrote" in damage_of(str(student))


def test_damaged_checksums_are_named_too(student: Path) -> None:
    text = (student / CHECKSUMS).read_text()
    (student / CHECKSUMS).write_text(text.replace("config", "konfig"))
    assert f"{student}/{CHECKSUMS} holds no checksums" in damage_of(str(student))


def test_a_student_of_an_older_version_is_not_checked(tmp_path: Path) -> None:
    put_file(f"{tmp_path}/model.safetensors", "weights")
    assert damage_of(str(tmp_path)) == ""


def test_in_a_bucket_too(bucket: str) -> None:
    for name, text in FILES.items():
        put_file(f"{bucket}/students/v1/{name}", text)
    note_checksums(f"{bucket}/students/v1")
    assert damage_of(f"{bucket}/students/v1") == ""
    put_file(f"{bucket}/students/v1/model.safetensors", "weighty")
    assert "model.safetensors" in damage_of(f"{bucket}/students/v1")
