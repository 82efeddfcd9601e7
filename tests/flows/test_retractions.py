"""Retracted files are kept for good, and a retraction names the versions that it means."""

import json
from pathlib import Path

import pytest

from cluster.files import StorageError
from flows.retractions import Retractions, versions_to_retract

OLD, NEW, OTHER = ("a.jsonl", "1"), ("a.jsonl", "2"), ("b.jsonl", "3")


def test_retractions_add_up(tmp_path: Path) -> None:
    retractions = Retractions(str(tmp_path))
    assert retractions.all() == frozenset()
    retractions.add([OLD])
    retractions.add([OTHER, OLD])
    assert Retractions(str(tmp_path)).all() == {OLD, OTHER}


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"files": [["a.jsonl", "1"]], "seal": "00000000"}'])
def test_a_list_that_cannot_be_read_is_refused_and_not_taken_for_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "retracted.json").write_text(content)
    with pytest.raises(StorageError, match=r"retracted\.json cannot be read"):
        Retractions(str(tmp_path)).all()


def test_a_flipped_bit_does_not_bring_a_file_back(tmp_path: Path) -> None:
    Retractions(str(tmp_path)).add([OLD])
    file = tmp_path / "retracted.json"
    file.write_text(file.read_text().replace("a.jsonl", "c.jsonl"))
    with pytest.raises(StorageError, match=r"retracted\.json cannot be read; restore it"):
        Retractions(str(tmp_path)).all()


def test_a_list_of_an_older_version_is_read_and_sealed_when_it_is_next_written(tmp_path: Path) -> None:
    file = tmp_path / "retracted.json"
    file.write_text(json.dumps({"files": [OLD]}))
    assert Retractions(str(tmp_path)).all() == {OLD}
    Retractions(str(tmp_path)).add([OTHER])
    assert Retractions(str(tmp_path)).all() == {OLD, OTHER}
    assert "seal" in json.loads(file.read_text())


@pytest.mark.parametrize(
    ("taken", "there", "meant"),
    [
        ([OLD, OTHER], [OLD, OTHER], [OLD]),  # the file is there as it was taken
        ([OLD, OTHER], [OTHER], [OLD]),  # it is gone
        ([OLD], [NEW], [OLD]),  # it was corrected, and not read again yet
        ([OLD, NEW], [NEW], [OLD]),  # it was corrected and read again: what it holds now stays
        ([OLD, NEW], [], [OLD, NEW]),
    ],
)
def test_retracting_a_changed_file_retracts_its_old_versions(
    taken: list[tuple[str, str]], there: list[tuple[str, str]], meant: list[tuple[str, str]]
) -> None:
    assert versions_to_retract("a.jsonl", taken, there) == meant


def test_a_file_that_no_refresh_took_is_refused_and_known_files_are_listed() -> None:
    with pytest.raises(ValueError, match=r"c\.jsonl: no refresh holds rows of this file; files with rows: a\.jsonl"):
        versions_to_retract("c.jsonl", [OLD], [])
