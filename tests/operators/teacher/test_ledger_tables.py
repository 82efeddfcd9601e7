"""The ledger's joins, on tables: which calls are new, and which reply a row gets."""

import pyarrow as pa
import pytest

from operators.teacher.calls import CALLS
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import CRASHED, FATAL, over_long
from operators.teacher.ledger_tables import (
    KEYED_REPLIES,
    KNOWN,
    asked_calls,
    measure_calls,
    merge,
    new_calls,
    without_replies,
)

ROWS = pa.schema([*CALLS, ("kept", pa.string())])


def row(key: str, messages: str | None = "[]") -> dict[str, object]:
    return {"call_key": key, "row_id": f"row {key}", "messages": messages, "schema": "", "max_tokens": 8, "kept": key}


def record(key: str, error: str = "", reply: str | None = None) -> dict[str, object]:
    said = None if error else reply or f"reply to {key}"
    counts = {"prompt_tokens": 1, "generated_tokens": 2}
    return {"call_key": key, "row_id": "", "reply": said, "finish_reason": "stop", **counts, "error": error}


def calls_and_known(calls: list[str], records: list[dict[str, object]]) -> tuple[pa.Table, pa.Table]:
    called = pa.Table.from_pylist([row(key) for key in calls], schema=CALLS)
    return called, pa.Table.from_pylist(records, schema=KNOWN)


@pytest.mark.parametrize(
    ("errors", "new"),
    [
        ([], True),
        ([""], False),
        (["boom"], True),
        (["boom", "boom"], False),  # of two attempts
        (["boom", ""], False),
        ([f"{FATAL}too long"], False),
        ([CRASHED], False),
        (["not fatal: boom"], True),
    ],
)
def test_a_call_is_new_until_a_record_settles_it(errors: list[str], new: bool) -> None:
    both = calls_and_known(["a", "b"], [record("a", error) for error in errors])
    assert new_calls(*both, 2)["call_key"].to_pylist() == (["a", "b"] if new else ["b"])


@pytest.mark.parametrize(("limits", "new"), [({1024}, False), ({1024, 2048}, False), ({2048}, True), ({102}, True)])
def test_a_prompt_that_was_too_long_is_tried_again_under_another_limit(limits: set[int], new: bool) -> None:
    both = calls_and_known(["a"], [record("a", over_long(1500, 1024))])
    assert new_calls(*both, 1, limits).num_rows == int(new)


def test_a_partition_without_rows_has_the_columns_of_calls() -> None:
    assert new_calls(CALLS.empty_table(), KNOWN.empty_table(), 2).schema == CALLS


def test_only_rows_that_ask_become_calls() -> None:
    table = pa.Table.from_pylist([row("a"), row("b", messages=None)], schema=ROWS)
    assert asked_calls(table)["call_key"].to_pylist() == ["a"]
    assert asked_calls(table).schema == CALLS
    assert without_replies(table)["reply"].null_count == 2


def test_a_row_gets_an_answer_before_a_failure_and_nothing_that_it_did_not_ask_for() -> None:
    rows = pa.Table.from_pylist([row("a"), row("b"), row("c")], schema=ROWS)
    records = [record("a", "boom"), record("a", reply="said"), record("b", "boom"), record("other")]
    replies = pa.Table.from_pylist(records, schema=KEYED_REPLIES)
    merged = {one["kept"]: one for one in merge(rows, replies).to_pylist()}
    assert {key: (one["reply"], one["error"]) for key, one in merged.items()} == {
        "a": ("said", ""),
        "b": (None, "boom"),
        "c": (None, None),
    }


def test_calls_are_measured_against_the_teachers_context() -> None:
    messages = '[{"role": "user", "content": "' + "x" * 300 + '"}]'
    calls = pa.Table.from_pylist([row("a", messages), row("b", "[]")], schema=ROWS)
    [sums] = measure_calls(calls, TeacherConfig(backend="openai", model="m", max_model_len=256)).to_pylist()
    assert (sums["new"], sums["over_long"], sums["reply_limit"]) == (2, 1, 16)
