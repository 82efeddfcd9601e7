"""A file's records are the same however it is cut, and only the broken part of a broken file is lost."""

import json
from pathlib import Path

import pytest

from operators.read import json_records
from tests.operators.read.source_samples import alpaca_like, records_of


@pytest.mark.parametrize("read_bytes", [1, 5, 64])
def test_a_json_array_is_the_same_through_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)
    path = tmp_path / "data.json"
    values: list[object] = [*alpaca_like(10), 12345678, "text", None, [1, [2]]]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert [record.value for record in records_of(path)] == values


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"[]", ["unreadable_file"]),  # no record at all
        (b"[{}, {}", ["", "", "rest_malformed"]),
        (b"[{}, {]", ["", "rest_malformed"]),
        (b"[{} {}]", ["", "rest_malformed"]),
        (b"[{}] tail", ["", "rest_malformed"]),
        (b"[" * 100_000, ["malformed_json"]),
        (b'[{"a": "\xff"}, {}]', ["invalid_utf8", ""]),
        (b"\xef\xbb\xbf[{}]", [""]),
        (b'{"a": 1}\n{"a": \n{"a": 2}\n', ["", "malformed_json", ""]),  # JSONL under another name
        (b'{\n"a": 1}\n{"a": 2}', ["", ""]),  # objects over several lines
        (b'{"data": [{}, {}]}', ["", ""]),
        (b'{"v": 1, "data": [\n{}, {}\n], "n": 2}', ["", ""]),
        (b'{"data": [{}], "test": [{}, {}]}', ["", "second_list"]),
        (b'{"data": [{}, {}', ["", "", "rest_malformed"]),
        (b'{"data": [{}]', ["", "rest_malformed"]),
        (b'{"data": [{}]} tail', ["", "rest_malformed"]),
        (b'{"data": []}', ["unreadable_file"]),
        (b"", ["unreadable_file"]),
    ],
)
def test_a_broken_json_file_keeps_the_rows_before_the_break(tmp_path: Path, content: bytes, reasons: list[str]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    assert [record.reason for record in records_of(path)] == reasons


def test_a_line_longer_than_any_record_is_skipped_without_being_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(json_records, "READ_BYTES", 30)
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n" + "x" * 1_000 + "\n{}\n")
    for range_bytes in (10, 64, 5_000):
        assert [record.reason for record in records_of(path, range_bytes)] == ["", "too_long", ""]


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json"])
def test_an_array_gives_one_record_per_element_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps([{"a": 1}, {"a": 2}, {"a": 3}]))
    assert [record.value for record in records_of(tmp_path / name)] == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("read_bytes", [40, 64, 1_000])
def test_an_object_around_records_is_the_same_through_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": "1", "data": alpaca_like(30)}))
    assert [record.value for record in records_of(path)] == alpaca_like(30)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("range_bytes", [100, 1 << 20])
def test_lines_with_a_list_that_is_named_like_a_wrapper_are_records(
    tmp_path: Path, name: str, range_bytes: int
) -> None:
    seeds = [
        {"id": f"seed_{index}", "instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}], "easy": True}
        for index in range(175)
    ]
    (tmp_path / name).write_text("\n".join(map(json.dumps, seeds)))
    assert [record.value for record in records_of(tmp_path / name, range_bytes)] == seeds
