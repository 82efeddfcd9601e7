"""Keys of calls, and replies that can be written to any file whatever they contain."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.teacher.calls import (
    CALLS,
    ERROR_CHARS,
    REPLIES,
    answered,
    base_key,
    call_key,
    call_seed,
    failed,
    is_cut_in_thoughts,
    replies_table,
)

CALL = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 8}


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)), st.integers(0, 10**20))
def test_whatever_a_teacher_says_fits_into_a_table(text: str, reason: str, count: int) -> None:
    table = replies_table([answered(CALL, text, reason, count, count), failed(CALL, text)])
    assert table.schema == REPLIES
    said, silent = table.to_pylist()
    assert said["finish_reason"] in ("stop", "length")
    assert said["error"] == ""
    assert silent["reply"] is None
    assert 0 < len(silent["error"]) <= ERROR_CHARS


@pytest.mark.parametrize("column", [name for name in CALLS.names if not name.endswith("_key")])
def test_each_part_of_a_call_is_in_its_key_and_all_but_its_limit_in_the_base(column: str) -> None:
    changed = {**CALL, column: 9 if column == "max_tokens" else "other"}
    assert call_key(changed, "stage", ["teacher"]) != call_key(CALL, "stage", ["teacher"])
    same_base = base_key(changed, "stage", ["teacher"]) == base_key(CALL, "stage", ["teacher"])
    assert same_base == (column == "max_tokens")


def test_a_reply_carries_the_base_of_its_call() -> None:
    asked = {**CALL, "base_key": "b"}
    assert replies_table([answered(asked, "x", "stop", 1, 1), failed(asked, "x")])["base_key"].to_pylist() == ["b"] * 2


def test_stage_and_teacher_are_in_the_key() -> None:
    keys = {call_key(CALL, stage, parts) for stage in ("one", "two") for parts in (["a"], ["b"], ["a", 1])}
    assert len(keys) == 6


def test_seeds_differ_by_call_and_fit_into_31_bits() -> None:
    seeds = {call_seed(call_key({**CALL, "row_id": str(n)}, "stage", [])) for n in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert json.dumps(sorted(seeds))


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ('<think>Maybe {"score": 2}? No, wait', "length", True),
        ("<think>Red.</think>\n<think>Or blue", "max_tokens", True),
        ("<think>Red.</think>\n", "length", True),
        (" \n", "length", True),
        ("<think>Red.</think>The colour of", "length", False),
        ("The colour of", "length", False),
        ("<think>Maybe", "stop", False),  # the limit did not end it: whoever reads it decides
    ],
)
def test_a_reply_that_is_cut_off_before_its_answer_holds_only_thoughts(text: str, reason: str, expected: bool) -> None:
    assert is_cut_in_thoughts(text, reason) == expected
