"""The shipped fake teacher gives the same reply to the same call, in the requested form."""

import json
from typing import Any

import pytest

from operators.reflect.parse_replies import Parsed, parse_reply
from operators.reflect.prompts import RESPONSE_CRITERIA, RESPONSE_SECTIONS, reply_schema
from operators.teacher.calls import CALLS
from operators.teacher.scripted_backend import scripted_batch, scripted_reply

SCHEMA = reply_schema(RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def call(number: int, schema: str = SCHEMA) -> dict[str, Any]:
    messages = json.dumps([{"role": "user", "content": "improve"}])
    return {
        "call_key": f"{number:064x}",
        "row_id": str(number),
        "messages": messages,
        "schema": schema,
        "max_tokens": 9,
    }


def numbered(number: int) -> dict[str, Any]:
    return call(0) | {"call_key": f"{number:08x}{'0' * 56}"}


def test_a_fluent_reply_is_the_same_each_time_and_parses() -> None:
    first = scripted_reply(numbered(5), "fluent")
    assert first == scripted_reply(numbered(5), "fluent")
    assert first != scripted_reply(numbered(6), "fluent")
    parsed = parse_reply(first["reply"], first["finish_reason"], "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS)
    assert isinstance(parsed, Parsed)


@pytest.mark.parametrize(("number", "failed", "structured"), [(1, False, True), (4, False, False), (7, True, False)])
def test_a_careless_teacher_fails_some_calls_and_forgets_the_form_of_others(
    number: int, failed: bool, structured: bool
) -> None:
    reply = scripted_reply(numbered(number), "careless")
    assert (reply["reply"] is None) == bool(reply["error"]) == failed
    assert failed or reply["reply"].startswith("{") == structured


def test_a_verdict_is_a_number_within_its_limits() -> None:
    score = {"type": "integer", "minimum": 1, "maximum": 10}
    schema = json.dumps({"properties": {"score_a": score, "score_b": score}})
    for number in range(30):
        verdict = json.loads(scripted_reply(numbered(number) | {"schema": schema}, "fluent")["reply"])
        assert all(1 <= value <= 10 for value in verdict.values())


def test_a_batch_is_one_table_of_replies() -> None:
    import pyarrow as pa

    table = scripted_batch(pa.Table.from_pylist([call(1), call(2)], schema=CALLS), "broken", None)
    assert table["error"].to_pylist() == ["scripted failure"] * 2
