"""The first words of an error decide whether its call is made again, counts as an attempt, and what is to blame."""

import pytest

from operators.teacher.failures import (
    BUSY,
    CUT_TEXTLESS,
    FATAL,
    LOST,
    NO_COMPLETION,
    REFUSED,
    is_attempt,
    is_teachers_fault,
    refusal,
    stage_failure,
)


@pytest.mark.parametrize(
    ("error", "attempt", "teachers_fault"),
    [
        ("", True, False),
        ("BadRequestError: 400", True, True),
        (f"{FATAL}the prompt is too long", True, False),
        (f"{REFUSED}AuthenticationError: 401", False, True),
        (f"{LOST}reset by peer", False, True),
        (f"{BUSY}429", False, True),
        (f"{NO_COMPLETION}a page", False, True),
    ],
)
def test_the_opening_words_decide(error: str, attempt: bool, teachers_fault: bool) -> None:
    assert (is_attempt(error), is_teachers_fault(error)) == (attempt, teachers_fault)


def test_a_refusal_names_the_keys_to_check() -> None:
    assert refusal(["", "boom"]) == ""
    assert "401" in refusal(["boom", f"{REFUSED}401"])
    assert "teacher.base_url" in refusal([f"{REFUSED}401"])


@pytest.mark.parametrize(("failed", "settled", "fails"), [(0, 0, False), (1, 2, False), (2, 3, True), (1, 1, True)])
def test_a_stage_fails_with_more_than_the_allowed_share(failed: int, settled: int, fails: bool) -> None:
    reason = stage_failure(failed, settled, 0.5, "boom")
    assert bool(reason) == fails
    assert not fails or (f"{failed} of {settled} calls failed" in reason and "'boom'" in reason)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (f"{BUSY}429", "teacher.requests_per_minute"),
        (f"{NO_COMPLETION}a page", "a base_url usually ends in /v1"),
        ("BadRequestError: 400", "teacher.leave_out_parameters"),
        (CUT_TEXTLESS, "raise teacher.max_tokens"),
    ],
)
def test_the_cure_fits_the_last_error(error: str, cure: str) -> None:
    assert cure in stage_failure(2, 2, 0.5, error)
