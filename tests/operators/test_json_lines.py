"""Lines as objects: each is valid JSON with time, level, run, refresh and, if the line names it, stage."""

import io
import json
from typing import Any

import pytest

from operators.json_lines import FORMAT_VARIABLE, JsonLines, wrapper_as_asked
from operators.progress import Records, StageProgress


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_line_is_an_object_however_it_was_cut() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream, "warning", run="r1", refresh="2026-11-27")
    for part in (
        "student: it sa",
        'id "no"\u2028\nplain words: of a person\n\nmade held_out: 3 rows in 1 s\nlog: x\nunfini',
    ):
        lines.write(part)
    found = objects(stream)
    assert [line["message"] for line in found] == [
        'student: it said "no"\u2028',
        "plain words: of a person",
        "made held_out: 3 rows in 1 s",
        "log: x",
    ]
    assert [line.get("stage") for line in found] == ["student", None, "held_out", None]
    assert {(line["run"], line["refresh"], line["level"]) for line in found} == {("r1", "2026-11-27", "warning")}
    assert all(line["time"].endswith("+00:00") for line in found)


def test_progress_is_numbers_and_written_when_it_changes() -> None:
    stream = io.StringIO()
    shown = Records(JsonLines(stream, "warning", run="r1"))
    for rows in (0, 0, 5):
        shown.show({"train": StageProgress(rows=rows, total=9, tokens=rows * 10, note="loss 2.0" if rows else "")})
    first, second = objects(stream)
    assert (first["stage"], first["rows"], first["total"], first["message"]) == ("train", 0, 9, "progress")
    assert (second["rows"], second["tokens"], second["message"], second["level"]) == (5, 50, "loss 2.0", "info")


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    for value, wrapped in (("", False), ("text", False), ("json", True)):
        monkeypatch.setenv(FORMAT_VARIABLE, value)
        assert (wrapper_as_asked(run="r")(out, err) != (out, err)) is wrapped
    monkeypatch.setenv(FORMAT_VARIABLE, "yaml")
    with pytest.raises(ValueError, match=r"\$RECYCLE_LOG_FORMAT: 'yaml' is not a format; give text or json"):
        wrapper_as_asked()
