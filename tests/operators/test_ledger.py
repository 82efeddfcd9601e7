"""The ledger never pays twice: same calls, crashed runs, poisonous rows, half-written files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.calls import call_key
from operators.ledger import Ledger
from operators.teacher import TeacherConfig

TEACHER = TeacherConfig(backend="scripted", model="fluent", batch_rows=4)
SCHEMA = json.dumps({"properties": {"better_response": {"type": "string"}}})


def calls(*row_ids: str, asked: bool = True, prompt: str = "improve") -> "ray.data.Dataset":
    message = json.dumps([{"role": "user", "content": prompt}])
    size = len(row_ids)
    table = {
        "row_id": list(row_ids),
        "kept": [f"text of {row_id}" for row_id in row_ids],
        "messages": pa.array([message if asked else None] * size, pa.string()),
        "schema": [SCHEMA] * size,
        "max_tokens": pa.array([64] * size, pa.int32()),
    }
    return ray.data.from_arrow(pa.table(table))


def rows_of(dataset: "ray.data.Dataset") -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in dataset.take_all()}


def paid(ledger: Ledger) -> tuple[float, float]:
    figures = ledger.figures()
    return figures["calls"], figures["cached_calls"]


@pytest.mark.usefixtures("local_ray")
class TestAnswer:
    def test_every_row_gets_its_own_reply_and_keeps_its_columns(self, tmp_path: Path) -> None:
        rows = rows_of(Ledger(str(tmp_path)).answer(calls(*"abcdefghij"), TEACHER, "stage"))
        assert sorted(rows) == list("abcdefghij")
        assert rows["c"]["kept"] == "text of c"
        assert all(json.loads(row["reply"])["better_response"] for row in rows.values())
        assert not {"messages", "schema", "max_tokens", "call_key"} & set(rows["a"])

    def test_second_run_makes_no_call_and_gives_the_same_replies(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage"))
        ledger = Ledger(str(tmp_path))
        assert rows_of(ledger.answer(calls("a", "b"), TEACHER, "stage")) == first
        assert paid(ledger) == (0, 2)

    def test_only_new_rows_are_asked(self, tmp_path: Path) -> None:
        Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage")
        ledger = Ledger(str(tmp_path))
        assert set(rows_of(ledger.answer(calls("a", "b", "c"), TEACHER, "stage"))) == {"a", "b", "c"}
        assert paid(ledger) == (1, 2)

    def test_a_changed_prompt_asks_again_but_other_stages_stay(self, tmp_path: Path) -> None:
        for stage in ("one", "two"):
            Ledger(str(tmp_path)).answer(calls("a"), TEACHER, stage)
        ledger = Ledger(str(tmp_path))
        ledger.answer(calls("a", prompt="improve!"), TEACHER, "one")
        ledger.answer(calls("a"), TEACHER, "two")
        assert paid(ledger) == (1, 1)

    def test_rows_that_are_not_asked_pass_through_without_a_reply(self, tmp_path: Path) -> None:
        ledger = Ledger(str(tmp_path))
        rows = rows_of(ledger.answer(calls("a", asked=False), TEACHER, "stage"))
        assert rows["a"]["reply"] is None
        assert paid(ledger) == (0, 0)

    def test_operational_settings_do_not_invalidate(self, tmp_path: Path) -> None:
        Ledger(str(tmp_path)).answer(calls("a"), TEACHER, "stage")
        ledger = Ledger(str(tmp_path))
        ledger.answer(calls("a"), TEACHER.model_copy(update={"replicas": 7, "batch_rows": 1}), "stage")
        assert paid(ledger) == (0, 1)

    def test_failed_calls_are_tried_again_until_the_limit_and_then_left(self, tmp_path: Path) -> None:
        careless = TEACHER.model_copy(update={"model": "careless", "max_attempts": 2})
        row_id = next(
            name for name in map(str, range(1000)) if int(key_of(name, careless)[:8], 16) % 7 == 0
        )  # one that this teacher always fails
        made = []
        for _ in range(4):
            ledger = Ledger(str(tmp_path))
            row = rows_of(ledger.answer(calls(row_id), careless, "stage"))[row_id]
            assert row["reply"] is None
            assert row["error"] == "scripted failure"
            made.append(ledger.figures()["calls"])
        assert made == [1, 1, 0, 0]

    def test_duplicate_records_and_unfinished_files_do_no_harm(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage"))
        [record, *_] = sorted((tmp_path / "stage").glob("*.parquet"))
        pq.write_table(pq.read_table(record), tmp_path / "stage" / "copy.parquet")
        (tmp_path / "stage" / ".half.unfinished").write_bytes(record.read_bytes()[:50])
        assert rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage")) == first

    def test_missing_column_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ray.exceptions.RayTaskError, match="ledger stage: columns messages are missing"):
            Ledger(str(tmp_path)).answer(calls("a").drop_columns(["messages"]), TEACHER, "stage")


def key_of(row_id: str, teacher: TeacherConfig) -> str:
    message = json.dumps([{"role": "user", "content": "improve"}])
    call = {"row_id": row_id, "messages": message, "schema": SCHEMA, "max_tokens": 64}
    return call_key(call, "stage", teacher.key_parts())
