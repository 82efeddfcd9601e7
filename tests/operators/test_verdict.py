"""A verdict is found in any text around it, and two that contradict are none."""

import json

import pytest

from operators.verdict import number_of, verdict_in

ONE = json.dumps({"critique": "A says {more}.", "score": 8})
OTHER = json.dumps({"score": 3})


@pytest.mark.parametrize(
    "reply",
    [
        ONE,
        f"```json\n{ONE}\n```",
        f"Of the form {{score}}: {ONE} That is all.",
        f"<think>Perhaps {OTHER}?</think>\n{ONE}",
        f"Perhaps {OTHER}?\n</think>\n{ONE}",
        f"{ONE}\n{ONE}",
        ONE.replace("more", "mo\nre"),
        f'{ONE} {{"note": "done"}}',
    ],
)
def test_the_verdict_of_a_reply_is_found(reply: str) -> None:
    found = verdict_in(reply, ["score"])
    assert found is not None
    assert found["score"] == 8


def test_a_reply_without_one_verdict_has_none() -> None:
    assert verdict_in(f"{ONE} or {OTHER}", ["score"]) is None
    assert verdict_in("8", ["score"]) is None
    assert verdict_in("{" * 100_000, ["score"]) is None
    assert verdict_in('{"mark": 8}', ["score"]) == {"mark": 8}
    assert verdict_in(f"<think>Perhaps {ONE}? No, wait", ["score"]) is None, "it was still thinking"


def test_a_verdict_as_deep_as_the_interpreter_reads_raises_nothing() -> None:
    for depth in range(800, 1000):  # somewhere here is the limit, which depends on the frames above
        verdict = verdict_in('{"score": ' + "[" * depth + "]" * depth + "}", ["score"])
        assert verdict is None or number_of(verdict["score"]) is None


def test_a_score_of_hundreds_of_digits_is_none() -> None:
    assert number_of(10**400) is None
    assert number_of(-(10**400)) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [(8, 8.0), (7.5, 7.5), ("8", 8.0), ("8/10", 8.0), (" 8 / 10 ", 8.0), ("7.5", 7.5), (True, None), (None, None),
     ("eight", None), ("8/5", None), ([8], None), ("-1", None)],
)  # fmt: skip
def test_scores_are_numbers_or_written_ones(value: object, number: float | None) -> None:
    assert number_of(value) == number
