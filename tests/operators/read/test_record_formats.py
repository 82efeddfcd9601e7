"""A file's records are the same through any cut, and a broken file costs no more than what is broken."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.read import record_formats
from tests.operators.read.source_samples import WRITERS, alpaca_like, records_of


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize("range_bytes", [1, 7, 100, 10_000])
def test_every_record_belongs_to_exactly_one_range(tmp_path: Path, kind: str, range_bytes: int) -> None:
    records = alpaca_like(40)
    path = WRITERS[kind](tmp_path / f"data.{kind}", records)
    found = records_of(path, range_bytes)
    assert [record.value for record in found] == records
    assert len({record.position for record in found}) == len(records)


@pytest.mark.parametrize("read_bytes", [1, 5, 64])
def test_a_json_array_is_the_same_through_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(record_formats, "READ_BYTES", read_bytes)
    path = tmp_path / "data.json"
    values: list[object] = [*alpaca_like(10), 12345678, "text", None, [1, [2]]]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert [record.value for record in records_of(path)] == values


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"[]", []),
        (b"[{}, {}", ["", "", "malformed_json"]),
        (b"[{}, {]", ["", "malformed_json"]),
        (b"[{} {}]", ["", "malformed_json"]),
        (b"[{}] tail", ["", "malformed_json"]),
        (b"[" * 100_000, ["malformed_json"]),
        (b'[{"a": "\xff"}, {}]', ["invalid_utf8", ""]),
        (b"\xef\xbb\xbf[{}]", [""]),
        (b'{"a": 1}\n{"a": \n{"a": 2}\n', ["", "malformed_json", ""]),  # JSONL by another name
        (b'{\n"a": 1}\n{"a": 2}', ["", ""]),  # objects over several lines
        (b"", ["unreadable_file"]),
    ],
)
def test_a_broken_json_file_keeps_the_rows_before_the_break(tmp_path: Path, content: bytes, reasons: list[str]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    assert [record.reason for record in records_of(path)] == reasons


def test_a_line_longer_than_any_record_is_skipped_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_formats, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(record_formats, "READ_BYTES", 30)
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n" + "x" * 1_000 + "\n{}\n")
    for range_bytes in (10, 64, 5_000):
        assert [record.reason for record in records_of(path, range_bytes)] == ["", "too_long", ""]


def test_a_damaged_row_group_does_not_cost_the_others(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    table = pa.Table.from_pylist(alpaca_like(21))
    pq.write_table(table, path, row_group_size=7, write_page_checksum=True, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start + 10 : start + 60] = b"\xff" * 50
    path.write_bytes(content)
    assert Counter(record.reason for record in records_of(path)) == {"": 14, "unreadable_file": 1}


def test_a_parquet_string_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    texts = pa.array([b"fine", b"caf\xe9", b"good"]).view(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"instruction": texts, "output": ["a", "b", "c"]}), path)
    assert [record.reason for record in records_of(path)] == ["", "invalid_utf8", ""]
