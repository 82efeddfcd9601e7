"""Weights that a copy left incomplete are found, whether vLLM or transformers loads them."""

import json
import shutil
from pathlib import Path

import pytest

from operators.model_files import weight_findings

INDEX = "model.safetensors.index.json"
KEY = "teacher.model"


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def found(folder: Path, *, any_name: bool = False) -> list[str]:
    return [str(finding) for finding in weight_findings(str(folder), KEY, any_name=any_name)]


@pytest.mark.parametrize("any_name", [True, False])
def test_complete_weights_have_no_finding(folder: Path, any_name: bool) -> None:
    assert found(folder, any_name=any_name) == []
    assert found(Path("someone/model-of-the-hub"), any_name=any_name) == []


@pytest.mark.parametrize("any_name", [True, False])
def test_a_half_copied_file_and_a_missing_part_are_named(folder: Path, any_name: bool) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    [half] = found(folder, any_name=any_name)
    assert half.startswith(f"{KEY}: {weights} cannot be read (")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    [lost] = found(folder, any_name=any_name)
    assert "lacks model-00001-of-00002.safetensors and 0 more of 1 weight files" in lost


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_no_index_is_a_finding(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    [finding] = found(folder)
    assert f"{INDEX} cannot be read" in finding


def test_parts_without_an_index_are_loaded_by_the_engine_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert found(folder, any_name=True) == []
    [finding] = found(folder)
    assert "has only model-00001-of-00001.safetensors, and it has no index" in finding
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    [lost] = found(folder, any_name=True)
    assert "lacks model-00001-of-00003.safetensors and 1 more of 3 weight files" in lost


@pytest.mark.parametrize("any_name", [True, False])
def test_a_pickle_is_refused(folder: Path, any_name: bool) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    [finding] = found(folder, any_name=any_name)
    assert "has only pytorch_model.bin, and a pickle is never loaded; save it again" in finding
    (folder / "pytorch_model.bin").unlink()
    assert "has no weights" in found(folder, any_name=any_name)[0]
