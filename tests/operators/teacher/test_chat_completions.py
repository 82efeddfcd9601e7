"""Whatever an endpoint returns becomes a complete reply or a failure with a reason."""

from types import SimpleNamespace

import pytest

from operators.teacher.chat_completions import read_completion, words_of
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BROKEN_OFF, FATAL


@pytest.mark.parametrize(("reason", "error"), [("length", "a reply without text"), ("content_filter", FATAL)])
def test_a_reply_without_text_counts_the_tokens_that_it_cost(reason: str, error: str) -> None:
    message = SimpleNamespace(content="", reasoning_content=None)
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=1000)
    completion = SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=reason)], usage=usage)
    call = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 1000}
    reply = read_completion(completion, call, TeacherConfig(backend="openai", model="m"))
    assert reply["error"].startswith(error)
    assert (reply["prompt_tokens"], reply["generated_tokens"]) == (3, 1000)


@pytest.mark.parametrize(
    ("reason", "ends"), [("error", None), ("Abort", None), ("MAX_TOKENS", "length"), ("eos", "stop")]
)
def test_a_reply_that_broke_off_is_a_failure(reason: str, ends: str | None) -> None:
    message = SimpleNamespace(content="The first half of")
    completion = SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=reason)], usage=None)
    call = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 1000}
    reply = read_completion(completion, call, TeacherConfig(backend="openai", model="m"))
    assert reply["finish_reason"] == ends
    assert reply["error"].startswith(BROKEN_OFF) == (ends is None)


def test_a_retry_after_that_is_too_long_is_named_in_the_error() -> None:
    response = SimpleNamespace(headers={"retry-after": "3600"})
    error = RuntimeError("slow down")
    error.response = response  # type: ignore[attr-defined]
    assert words_of(error) == "slow down; it asks to come back after 3600 s"
