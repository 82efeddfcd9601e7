"""Text files are read as UTF-8 however they are compressed, and files that can be cut into lines are recognised."""

import gzip
from pathlib import Path

import pytest
from pyarrow import fs

from operators.read.text_streams import format_of, holds_lines, is_damaged, open_text, wrapped_records

TEXT = '{"a": "\u00e9\u4f60\U0001f600"}\n' * 3_000
LOCAL = fs.LocalFileSystem()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_is_utf8_whatever_the_file_is(tmp_path: Path, encoding: str, packed: bool) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    content = TEXT.encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    stream, is_plain = open_text(LOCAL, str(path))
    with stream:
        assert stream.read().decode("utf-8-sig") == TEXT
    assert is_plain == (encoding.startswith("utf-8") and not packed)


def test_a_compressed_file_that_is_cut_off_is_damaged_and_not_the_end(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode(), compresslevel=1)
    for content in (whole[:-20], whole[:20] + b"\xff" * 40 + whole[60:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(OSError) as caught:
            open_text(LOCAL, str(tmp_path / "a.jsonl.gz"))[0].read()
        assert is_damaged(caught.value), caught.value
    assert not is_damaged(OSError("When reading information for key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION"))


def test_the_format_is_told_by_the_name() -> None:
    assert format_of("/x.y/A.JSONL.gz") == ("jsonl", "gzip")
    assert format_of("a.csv.zst") == ("csv", "zstd")
    assert format_of("a.parquet") == ("parquet", None)
    assert format_of("README") == ("readme", None)


@pytest.mark.parametrize(
    ("head", "kind", "expected"),
    [
        ('{"a": 1}\n{"a": 2}\n', "jsonl", True),
        ('{"a": 1}\n{"a": 2}\n', "json", True),
        ('\ufeff\n\n{"a": 1}\n', "json", True),
        ('{"a": \n{"a": 2}\n', "jsonl", True),  # a broken line costs one record
        ('{"a": \n{"a": 2}\n', "json", False),
        ('{\n  "a": 1\n}\n', "jsonl", False),
        ('[{"a": 1}, {"a": 2}]', "jsonl", False),
        ('[\n{"a": 1},\n', "ndjson", False),
        ("[1]\n[2]\n", "jsonl", True),
        ('{"data": [{"a": 1}]}', "jsonl", False),
        ('{"version": "1.1", "Data": [\n{"a": 1}', "json", False),
        ('{"messages": [{"data": []}]}', "json", True),
        ('{"id": "a", "instances": [{"input": ""}], "is_classification": true}\n{"id": "b"}', "jsonl", True),
        ('{"examples": [{"output": "1"}], "output": "2"}\n{"examples": []}\n', "json", True),
        ('{"data": [], "output": "2"}\n{"data": [], "output": "3"}\n', "jsonl", True),
        ('{"data": [{"a": 1}]}\n\n', "jsonl", False),
        ("words", "jsonl", True),
        ("words", "json", False),
        ("", "jsonl", True),
    ],
)
def test_lines_are_told_from_arrays_and_objects(head: str, kind: str, expected: bool) -> None:
    assert holds_lines(head.encode(), kind) == expected


def test_utf16_cannot_be_cut() -> None:
    assert not holds_lines('{"a": 1}\n'.encode("utf-16"), "jsonl")


def test_records_in_an_object_are_found_wherever_it_is_cut_off() -> None:
    text = '{"version": 1, "rows": [ {"a": 1}]}'
    assert wrapped_records(text) == text.index("{", 1)
    for end in range(text.index("["), len(text)):
        assert wrapped_records(text[: end + 1]) is not None
    assert wrapped_records('{"messages": [{"rows": [{}]}], "rows": [{}]}') is None  # the list is a record's own
    assert wrapped_records('{"rows": 3}') is None
    assert wrapped_records("[]") is None
