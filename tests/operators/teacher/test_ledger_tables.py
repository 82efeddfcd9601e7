"""The ledger's joins, on tables: which calls are new, and which reply a row gets."""

import pyarrow as pa
import pytest

from operators.teacher.calls import CALLS
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import CRASHED, CUT_TEXTLESS, FATAL, OVER_CONTEXT, over_long
from operators.teacher.ledger_tables import (
    KEYED_REPLIES,
    KNOWN,
    Tries,
    asked_calls,
    measure_calls,
    merge,
    new_calls,
    without_replies,
)
from operators.teacher.variants import Member, member_of_row

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
    assert new_calls(*both, Tries(2, (1024,)))["call_key"].to_pylist() == (["a", "b"] if new else ["b"])


@pytest.mark.parametrize(("limits", "new"), [((1024,), False), ((1024, 2048), False), ((2048,), True), ((102,), True)])
def test_a_prompt_that_was_too_long_is_tried_again_under_another_limit(limits: tuple[int, ...], new: bool) -> None:
    both = calls_and_known(["a"], [record("a", over_long(1500, 1024))])
    assert new_calls(*both, Tries(1, limits)).num_rows == int(new)


OVER = f"{OVER_CONTEXT}BadRequestError: maximum context length is 4096 tokens"
OVER_BEFORE = f"{FATAL}BadRequestError: maximum context length is 4096 tokens"  # as ledgers of version 0.1.0 have it


@pytest.mark.parametrize("error", [OVER, OVER_BEFORE])
@pytest.mark.parametrize(("made_under", "new"), [(4096, True), (8192, False), (None, False)])
def test_a_call_over_the_endpoints_context_is_made_again_under_another_max_model_len(
    error: str, made_under: int | None, new: bool
) -> None:
    both = calls_and_known(["a"], [{**record("a", error), "max_model_len": made_under}])
    assert new_calls(*both, Tries(1, (8192,))).num_rows == int(new)
    assert new_calls(*both, Tries(1, (8192,), lengthen=False)).num_rows == int(new)


def cut_off(prompt: int, generated: int, made_under: int | None, error: str = "") -> dict[str, object]:
    counts = {"prompt_tokens": prompt, "generated_tokens": generated, "max_model_len": made_under}
    return {**record("a", error), "finish_reason": None if error else "length", **counts}


@pytest.mark.parametrize(
    ("known", "limit", "new"),
    [
        (cut_off(95, 5, 100), 200, True),  # the row asks for 8 tokens: the context cut it off
        (cut_off(95, 5, 100), 100, False),
        (cut_off(95, 5, 100), 50, False),
        (cut_off(92, 8, 100), 200, False),  # its own limit did
        (cut_off(95, 5, None), 200, True),  # from an older ledger, which did not record the limit
        (cut_off(95, 5, None), 100, False),
        (cut_off(95, 5, 200), 200, False),  # an endpoint has its own limit: it is asked once for each of ours
        (cut_off(95, 5, 100, CUT_TEXTLESS), 200, True),  # it consisted of thoughts only
        (cut_off(95, 5, 200, CUT_TEXTLESS), 200, False),
        ({**record("a"), "max_model_len": 100}, 200, False),  # ended by itself
    ],
)
def test_a_reply_that_the_context_cut_off_is_asked_for_again_under_a_larger_one(
    known: dict[str, object], limit: int, new: bool
) -> None:
    both = calls_and_known(["a"], [known])
    assert new_calls(*both, Tries(1, (limit,))).num_rows == int(new)
    assert new_calls(*both, Tries(1, (limit,), lengthen=False)).num_rows == 0


def test_each_row_of_a_mix_is_compared_with_the_context_of_its_own_teacher() -> None:
    of_row = {"row_id": "row a", "max_model_len": 100}
    first = member_of_row("row a", [1.0, 1.0])
    for known in (cut_off(95, 5, 100), record("a", over_long(150, 100)), record("a", OVER)):
        both = calls_and_known(["a"], [known | of_row])
        for member, new in ((first, 1), (1 - first, 0)):
            limits = tuple(200 if number == member else 100 for number in range(2))
            assert new_calls(*both, Tries(1, limits, (1.0, 1.0))).num_rows == new


def test_the_whole_reply_takes_the_place_of_the_one_that_was_cut_off() -> None:
    rows = pa.Table.from_pylist([row("a"), row("b")], schema=ROWS)
    whole = {**record("a", reply="a whole reply"), "generated_tokens": 4}
    longer = {**cut_off(95, 7, 200), "call_key": "b", "reply": "b cut lat"}
    records = [cut_off(95, 5, 100), whole, longer, {**cut_off(95, 5, 100), "call_key": "b"}]
    replies = pa.Table.from_pylist(records, schema=KEYED_REPLIES)
    merged = {one["kept"]: one["reply"] for one in merge(rows, replies).to_pylist()}
    assert merged == {"a": "a whole reply", "b": "b cut lat"}


def of_base(record: dict[str, object]) -> dict[str, object]:
    """The record of a call that was made under another length limit, with a known base key."""
    return {**record, "call_key": "made before", "base_key": "base of a"}


@pytest.mark.parametrize(
    ("known", "new"),
    [
        (of_base(record("a")), False),  # ended by itself
        (of_base(record("a", "boom")), True),  # another limit, another try
        (of_base(record("a", f"{FATAL}filtered")), False),
        (of_base(record("a", over_long(1500, 1024))), True),
        (of_base(record("a", OVER)), True),  # there may be room for a reply under the new limit
        (of_base(record("a", OVER_BEFORE)), True),
        ({**of_base(record("a", OVER)), "max_model_len": 200}, True),
        (of_base(cut_off(50, 5, 100)), True),  # its own limit of 5 has cut it off, the row asks for 8
        (of_base(cut_off(50, 8, 100)), False),  # cut off, but as long as the row wants it
        (of_base(cut_off(50, 5, 100, CUT_TEXTLESS)), True),
        (of_base(cut_off(95, 5, 100)), True),  # the context did, and it is larger now
        (of_base(cut_off(195, 5, 200)), False),  # the context did, and it is the same
        ({**of_base(record("a")), "base_key": "other"}, True),
        ({**of_base(record("a")), "base_key": None}, True),  # from an older ledger, without base keys
    ],
)
def test_another_length_limit_asks_only_for_what_the_old_one_cut_off(known: dict[str, object], new: bool) -> None:
    called = pa.Table.from_pylist([{**row("a"), "base_key": "base of a"}, row("b")], schema=CALLS)
    assert (
        "a" in new_calls(called, pa.Table.from_pylist([known], schema=KNOWN), Tries(3, (200,)))["call_key"].to_pylist()
    ) == new


def test_a_reply_under_another_limit_is_used_after_one_under_the_current_limit() -> None:
    rows = pa.Table.from_pylist([{**row("a"), "base_key": "base of a"}], schema=ROWS)
    before, cut = of_base(record("a", reply="whole")), {**of_base(cut_off(50, 5, 100)), "reply": "cut"}
    now = record("a", reply="now")

    def brought(*records: dict[str, object]) -> object:
        return merge(rows, pa.Table.from_pylist([*records], schema=KEYED_REPLIES))["reply"].to_pylist()

    assert brought(cut, before) == ["whole"]
    assert brought(cut) == [None]
    assert brought(cut, now) == ["now"]


def test_a_partition_without_rows_has_the_columns_of_calls() -> None:
    assert new_calls(CALLS.empty_table(), KNOWN.empty_table(), Tries(2, (1024,))).schema == CALLS


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


@pytest.mark.parametrize(
    ("length", "over_long", "reply_limit"),
    [(3072, 0, 1024), (3073, 0, 1023), (4095, 0, 1), (4096, 1, 0), (5000, 1, 0)],
)
def test_a_call_of_vllm_is_over_long_only_if_the_engine_does_not_make_it(
    monkeypatch: pytest.MonkeyPatch, length: int, over_long: int, reply_limit: int
) -> None:
    monkeypatch.setattr("operators.teacher.ledger_tables.num_prompt_tokens", lambda *_: length)
    calls = pa.Table.from_pylist([{**row("a"), "max_tokens": 1024}], schema=ROWS)
    [sums] = measure_calls(calls, [Member(TeacherConfig(model="m"), 1.0)]).to_pylist()
    assert (sums["new"], sums["over_long"], sums["reply_limit"]) == (1, over_long, reply_limit)
    assert sums["prompt_tokens"] == (0 if over_long else length)


def test_every_call_of_an_endpoint_is_made_and_counted() -> None:
    """Its prompt is measured in bytes, and its context is not ours."""
    messages = '[{"role": "user", "content": "' + "x" * 5000 + '"}]'
    calls = pa.Table.from_pylist([{**row("a", messages), "max_tokens": 4096}], schema=ROWS)
    [sums] = measure_calls(calls, [Member(TeacherConfig(backend="openai", model="m"), 1.0)]).to_pylist()
    assert sums == {"new": 1, "over_long": 0, "prompt_tokens": 5064, "reply_limit": 4096}


def test_each_call_of_a_mix_is_measured_for_its_own_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.teacher.ledger_tables.num_prompt_tokens", lambda *_: 300)
    calls = pa.Table.from_pylist([row("a"), row("b")], schema=ROWS)
    long, short = (Member(TeacherConfig(model="m", max_model_len=room), 1.0) for room in (4096, 256))
    parts = [measure_calls(calls, members).to_pylist()[0] for members in ([long, short], [long], [short])]
    assert [part["over_long"] for part in parts][1:] == [0, 2]
    assert parts[0]["over_long"] == sum(member_of_row(name, [1, 1]) for name in calls["row_id"].to_pylist())
