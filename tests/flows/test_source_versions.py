"""The name of a source file and the identity of its content."""

import os
import time
from pathlib import Path

import pytest

from flows import source_versions
from flows.source_versions import source_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "2026-11").mkdir()
    for name in ("a.jsonl", "2026-11/b.jsonl"):
        (tmp_path / name).write_text('{"instruction": "x", "output": "y"}\n')
    return tmp_path


def test_files_are_named_below_the_source_and_equal_content_has_one_identity(source: Path) -> None:
    first, second = source_files(str(source))
    assert {first.name, second.name} == {"a.jsonl", "2026-11/b.jsonl"}
    assert first.identity == second.identity != ""
    [alone] = source_files(f"{source}/2026-11")
    assert (alone.name, alone.identity) == ("b.jsonl", second.identity)


def test_other_content_of_the_same_size_is_another_file_and_a_touched_one_is_not(source: Path) -> None:
    file = source / "a.jsonl"
    before = {one.name: one.identity for one in source_files(str(source))}
    os.utime(file, (1, 1))
    assert {one.name: one.identity for one in source_files(str(source))} == before
    file.write_text(file.read_text().replace("x", "z"))
    after = {one.name: one.identity for one in source_files(str(source))}
    assert after["a.jsonl"] != before["a.jsonl"]
    assert after["2026-11/b.jsonl"] == before["2026-11/b.jsonl"]


def test_size_and_time_of_a_large_file_are_part_of_its_identity(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_versions, "WHOLE_FILE_BYTES", 10)
    source_versions._identity.cache_clear()
    [before] = source_files(f"{source}/2026-11")
    file = source / "2026-11" / "b.jsonl"
    file.write_text(file.read_text() * 2)
    [after] = source_files(f"{source}/2026-11")
    assert before.identity != after.identity
    assert before.identity[:16] == after.identity[:16], "the first ten bytes are the same"


def test_a_file_that_changed_just_now_waits(source: Path) -> None:
    os.utime(source / "a.jsonl", (1, 1))
    assert [one.name for one in source_files(str(source), settle_s=600)] == ["a.jsonl"]


@pytest.mark.parametrize("ahead_s", [5, 86_400 * 365])
def test_a_file_from_the_future_settles_when_it_was_seen_unchanged_for_long_enough(
    source: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    file, seconds = source / "2026-11" / "b.jsonl", 1000.0
    monkeypatch.setattr("flows.first_seen.time.monotonic", lambda: seconds)
    os.utime(source / "a.jsonl", (1, 1))

    def names() -> list[str]:
        return [one.name for one in source_files(str(source), settle_s=600)]

    os.utime(file, (time.time() + ahead_s,) * 2)
    assert names() == ["a.jsonl"]
    seconds += 599
    assert names() == ["a.jsonl"]
    file.write_text(file.read_text() * 2)  # it still grows
    os.utime(file, (time.time() + ahead_s,) * 2)
    assert names() == ["a.jsonl"]
    seconds += 599
    assert names() == ["a.jsonl"]
    seconds += 1
    assert names() == ["2026-11/b.jsonl", "a.jsonl"]


def test_a_file_that_is_gone_since_it_was_listed_has_no_identity(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(self)

    source_versions._identity.cache_clear()
    monkeypatch.setattr(Path, "open", refuse)
    assert {one.identity for one in source_files(str(source))} == {""}
