"""Rows of tables are records, and a broken row, row group or file does not affect others."""

from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.read.config import ReadConfig
from operators.read.read_record import extract
from operators.read.record_fields import is_wanted
from operators.read.record_formats import read_records
from operators.read.source_files import Piece
from tests.operators.read.source_samples import alpaca_like, records_of


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


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("a,b\n1,2\n", [{"a": "1", "b": "2"}]),
        ("\ufeffa;b\n1;2,5\n", [{"a": "1", "b": "2,5"}]),  # from a spreadsheet with decimal commas
        ('a,b\n"x\n\ny","say ""hi"""\n\n3,4', [{"a": "x\n\ny", "b": 'say "hi"'}, {"a": "3", "b": "4"}]),
        ("a,b\n1\n2,3\n4,5,6\n", ["malformed_csv", {"a": "2", "b": "3"}, "malformed_csv"]),
        ('a,b\n1,5" pipe\n2,say ""hi""\n', [{"a": "1", "b": '5" pipe'}, {"a": "2", "b": 'say ""hi""'}]),
        ('a,b\n1,"x\n2,y\n3,"z"\n4,w\n', ["malformed_csv", {"a": "4", "b": "w"}]),  # a quote that row 3 closes
        ('a,b\n1,"say "hi" to"\n2,y\n', ["malformed_csv", {"a": "2", "b": "y"}]),
        ('a,b\n1,x\n2,"y\n', [{"a": "1", "b": "x"}, "rest_malformed"]),  # cut off
        ('"a,b\n1,x\n2,y\n', ["rest_malformed"]),
        ('"a" b,c\n1,x\n2,y\n', ["rest_malformed"]),  # the next row is not the header
        ("a,b\n", ["unreadable_file"]),  # no record at all
        ("\n\na\n1\n", [{"a": "1"}]),
        ("a,b,a,a,a (2)\n1,2,3,4,5\n", [{"a": "1", "b": "2", "a (3)": "3", "a (4)": "4", "a (2)": "5"}]),
    ],
)
def test_delimited_rows_are_dicts_of_text(tmp_path: Path, content: str, values: list[object]) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content, encoding="utf-8")
    assert [record.reason or record.value for record in records_of(path)] == values


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_rows_behind_a_quote_that_nothing_closes_are_counted_and_their_lines_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    mark = "," if kind == "csv" else "\t"
    rows = [f"Question {number}{mark}Answer {number}." for number in range(1000)]
    rows[5] = f'Question 5{mark}"He said hi'
    path.write_text("\n".join([f"instruction{mark}output", *rows, ""]))
    *good, rest = records_of(path)
    assert [record.value for record in good] == [
        {"instruction": f"Question {number}", "output": f"Answer {number}."} for number in range(5)
    ]
    assert (rest.value, rest.raw, rest.reason) == (None, "lines 7 to 1001: unexpected end of data", "rest_malformed")


def test_the_lines_that_a_stray_quote_joins_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('a,b\n1,"x\n2,y\n3,"z"\n4,"say "hi""\n')
    assert [record.raw.partition(":")[0] for record in records_of(path)] == ["lines 2 to 4", "line 5"]


def test_a_csv_row_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"a,b\n1,caf\xe9\n2,3\n")
    assert [record.reason for record in records_of(path)] == ["invalid_utf8", ""]


def test_columns_that_are_not_wanted_are_named_if_they_hold_something(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    columns = {"output": ["a", "b"], "vector": [[1.0], [2.0]], "nothing": pa.nulls(2, pa.string()), "blank": ["", ""]}
    pq.write_table(pa.table(columns), path)
    found = list(read_records(Piece(0, str(path), 0, path.stat().st_size), lambda name: name == "output"))
    assert [record.value for record in found] == [{"output": "a"}, {"output": "b"}]
    assert {record.unread for record in found} == {("vector",)}


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "jsonl", "json"])
def test_the_second_of_two_columns_of_one_name_is_named_as_unread_and_the_first_is_not_lost(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"data.{kind}"
    table = pa.Table.from_arrays(
        [pa.array([text]) for text in ("Add.", "2", "two")], ["instruction", "output", "output"]
    )
    if kind == "csv":
        path.write_text("instruction,output,output\nAdd.,2,two\n")
    elif kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        record = '{"instruction": "Add.", "output": "2", "output": "two"}'
        path.write_text(f"[{record}]" if kind == "json" else record)
    config = ReadConfig(path=str(path))
    wanted = partial(is_wanted, columns={}, pass_through=())
    [record] = read_records(Piece(0, str(path), 0, path.stat().st_size), wanted)
    found = extract(record, config)
    assert [exchange.texts for exchange in found.exchanges] == [("Add.", "", "2")]
    assert found.unread == ["output (2)"]
