"""Missing fields of the source are reported before any call is paid, with the columns that exist."""

import json
from pathlib import Path

import pytest

from operators.read.config import ReadConfig
from operators.read.doctor import examine_source, first_rows


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_a_source_without_a_field_is_refused_with_the_field_and_the_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"instruction": "Name a bird.", "Reply": "A wren."})
    (found,) = examine_source(ReadConfig(path="x"), [file])
    assert found.fatal
    assert found.key == "source.path"
    for part in (file, "missing: response", "instruction, Reply", "source.columns={response: <column>}"):
        assert part in found.text
    mapped = ReadConfig.model_validate({"path": "x", "columns": {"response": "Reply"}})
    assert examine_source(mapped, [file]) == []


def test_one_file_that_cannot_be_used_among_others_is_a_warning(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", {"instruction": "Name a bird.", "output": "A wren.", "topic": "birds"})
    bad = write(tmp_path / "b.jsonl", {"title": "Birds"}, [1])
    found = examine_source(ReadConfig(path="x"), [good, bad])
    assert not any(each.fatal for each in found)
    assert "missing_field 1 (say which column is which by source.columns), not_an_object 1" in found[0].text
    assert "missing: instruction, response" in found[0].text
    assert "topic, title" in found[1].text


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"["])
def test_a_file_that_cannot_be_read_is_a_finding_and_no_exception(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    (found,) = examine_source(ReadConfig(path="x"), [str(tmp_path / "a.jsonl")])
    assert found.fatal
    assert "none of the first 1 records" in found.text


def test_the_first_rows_are_those_that_the_run_would_read(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.jsonl", {"title": "Birds"})
    good = write(tmp_path / "b.jsonl", {"instruction": "Name a bird.", "output": " A wren.", "topic": "birds"}, [1])
    config = ReadConfig.model_validate({"path": "x", "pass_through": ["topic"], "held_out_fraction": 0})
    (row,) = first_rows(config, [bad, good])
    assert (row["instruction"], row["response"], row["extra"]) == ("Name a bird.", "A wren.", '{"topic": "birds"}')
    assert row["outcome"] == ""
    assert first_rows(config, [bad]) == []
