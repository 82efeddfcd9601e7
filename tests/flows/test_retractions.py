"""Retracted files are kept for good, and a retraction names the versions that it means."""

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


def test_a_list_that_cannot_be_read_is_refused_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "retracted.json").write_text("{")
    with pytest.raises(StorageError, match=r"retracted\.json cannot be read"):
        Retractions(str(tmp_path)).all()


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
