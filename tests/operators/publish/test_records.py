"""JSON lines hold what was passed through, to the last digit and with its type, under the same names in all formats."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from operators.columns import RECYCLED
from operators.publish.records import alpaca_table, messages_table, write_records

TAKEN = frozenset({"row_id", "outcome", "instruction", "input", "output", "messages"})
EXTRAS: list[dict[str, Any]] = [
    {"id": (1 << 60) + 1, "score": 0.12345678901234567, "tags": ["a", "b"], "outcome": "won"},
    {"score": 1e-300, "note": 'line\u2028"break"\n'},
    {},
]
KINDS = {"id": "int", "note": "text", "outcome": "text", "score": "float", "tags": "json"}


def a_row(number: int, outcome: str = "both", turns: str = "") -> dict[str, Any]:
    texts = {"final_instruction": f"Question {number}", "input": "", "final_response": f"Answer {number}"}
    extra = EXTRAS[number] if number < len(EXTRAS) else {}
    return {"row_id": f"{number}", "outcome": outcome, "turns_before": turns, "turns_after": "", **texts} | {
        "extra": json.dumps(extra) if extra else ""
    }


TALK = json.dumps([{"role": "system", "content": "Be brief."}])
ROWS = pa.Table.from_pylist(
    [a_row(0), a_row(1), a_row(2), a_row(3, "dropped:held_out"), a_row(4, turns=TALK)], RECYCLED
)


def test_the_columns_have_the_published_names_in_both_forms() -> None:
    others = ["id", "note", "source_outcome", "score", "tags"]
    assert alpaca_table(ROWS, KINDS, TAKEN).column_names == ["instruction", "input", "output", *others]
    assert messages_table(ROWS, KINDS, TAKEN).column_names == ["messages", *others]
    assert alpaca_table(ROWS, KINDS, TAKEN)["source_outcome"].to_pylist() == ["won", None, None]


def test_nothing_that_was_passed_through_changes_on_its_way_into_json_lines(local_ray: None, tmp_path: Path) -> None:
    import ray

    assert write_records(ray.data.from_arrow(ROWS), fs.LocalFileSystem(), str(tmp_path), KINDS, TAKEN) == 3
    lines = [line for file in (tmp_path / "alpaca").iterdir() for line in file.read_bytes().split(b"\n") if line]
    read = {record["instruction"]: record for record in map(json.loads, lines)}
    assert read["Question 0"]["id"] == (1 << 60) + 1
    assert read["Question 0"]["score"] == EXTRAS[0]["score"]
    assert read["Question 0"]["tags"] == '["a", "b"]'
    assert (read["Question 1"]["id"], read["Question 1"]["score"]) == (None, 1e-300)
    assert read["Question 1"]["note"] == EXTRAS[1]["note"]
    [file, *_] = (tmp_path / "messages").iterdir()
    assert file.suffix == ".jsonl"
    talks = [json.loads(line) for file in (tmp_path / "messages").iterdir() for line in file.read_bytes().splitlines()]
    assert sorted(len(talk["messages"]) for talk in talks) == [2, 2, 2, 3]
