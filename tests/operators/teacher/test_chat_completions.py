"""Whatever an endpoint returns becomes a complete reply or a failure with a reason."""

from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from operators.teacher.chat_completions import failure_kind, read_completion, words_of
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BROKEN_OFF, CUT_TEXTLESS, FATAL, OVER_CONTEXT


@pytest.mark.parametrize(("reason", "error"), [("length", "a reply without text"), ("content_filter", FATAL)])
def test_a_reply_without_text_counts_the_tokens_that_it_cost(reason: str, error: str) -> None:
    message = SimpleNamespace(content="", reasoning_content=None)
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=1000)
    completion = SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=reason)], usage=usage)
    call = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 1000}
    reply = read_completion(completion, call, TeacherConfig(backend="openai", model="m"))
    assert reply["error"].startswith(error)
    assert (reply["prompt_tokens"], reply["generated_tokens"]) == (3, 1000)


TEACHER = TeacherConfig(backend="openai", model="m")
CALL = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 4096}


def completed(reason: str = "stop", usage: Any = None, **message: Any) -> Any:
    choice = SimpleNamespace(message=SimpleNamespace(**message), finish_reason=reason)
    return SimpleNamespace(choices=[choice], usage=usage)


@pytest.mark.parametrize(
    ("completion", "least"),
    [
        (completed(content="ok", reasoning_content="think " * 500), 3002),
        (completed(content="ok", reasoning="think " * 500, reasoning_content="think " * 500), 3002),
        (completed(content="ok", reasoning="think " * 5000), 4096),
        (completed("length", content=""), 4096),
        (completed("length", content="", reasoning_content=None), 4096),
        (completed("length", content="short"), 4096),
        (completed("MAX_TOKENS", content="short"), 4096),
        (completed("stop", content=None), 4096),
        (completed("content_filter", content=None), 4096),
        (completed("error", content=None), 4096),
        (completed(content=None, refusal="I cannot help."), 14),
        (completed(content="ok", usage=SimpleNamespace(prompt_tokens=5, completion_tokens=0)), 2),
        (completed(content="ok", usage=SimpleNamespace(prompt_tokens=5, completion_tokens=2, total_tokens=907)), 902),
        (completed(content="ok", usage=SimpleNamespace(prompt_tokens=5, completion_tokens=2, total_tokens=None)), 2),
        (completed(content="ok", usage=SimpleNamespace(completion_tokens=2, total_tokens=7)), 2),
    ],
)
def test_thoughts_and_replies_that_were_cut_off_count_for_the_budget(completion: Any, least: int) -> None:
    assert read_completion(completion, CALL, TEACHER)["generated_tokens"] == least


def test_a_reply_without_a_limit_counts_whole() -> None:
    teacher = TeacherConfig(backend="openai", model="m", leave_out_parameters=("max_tokens",))
    assert read_completion(completed(content="x" * 9000), CALL, teacher)["generated_tokens"] == 9000


def test_the_words_of_a_refusal_are_kept_and_the_call_is_not_made_again() -> None:
    error = read_completion(completed(content=None, refusal="I cannot\nhelp."), CALL, TEACHER)["error"]
    assert error == f"{FATAL}the model refuses to answer: I cannot help."
    answered = read_completion(completed(content="Blue.", refusal=""), CALL, TEACHER)
    assert (answered["reply"], answered["error"]) == ("Blue.", "")


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


DRAFT = '{"better_response": "A draft that I doubt."} No, wait'


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "model_length"])
@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": DRAFT},
        {"content": None, "reasoning": DRAFT},
        {"content": " \n", "reasoning_content": DRAFT},
        {"content": f"<think>{DRAFT}"},  # an endpoint without a reasoning parser
        {"content": ""},
    ],
)
def test_thoughts_that_the_limit_cut_off_are_no_reply_and_are_paid(reason: str, message: dict[str, Any]) -> None:
    completion = completed(reason, SimpleNamespace(prompt_tokens=5, completion_tokens=4096), **message)
    reply = read_completion(completion, CALL, TEACHER)
    assert (reply["reply"], reply["error"]) == (None, CUT_TEXTLESS)
    assert (reply["prompt_tokens"], reply["generated_tokens"]) == (5, 4096)


def test_an_answer_that_a_parser_took_for_thoughts_is_used_unless_it_is_cut_off() -> None:
    assert read_completion(completed(content=None, reasoning_content="Blue."), CALL, TEACHER)["reply"] == "Blue."
    said = read_completion(completed("length", content="Blue and", reasoning_content="Red? No."), CALL, TEACHER)
    assert (said["reply"], said["finish_reason"]) == ("Blue and", "length")


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [
        (400, "maximum context length is 4096 tokens; 3476 in the messages, 1024 in the completion", OVER_CONTEXT),
        (400, "the request exceeds the available context size (4096 tokens), try increasing it", OVER_CONTEXT),
        (400, "prompt is too long: 208310 tokens > 200000 maximum", OVER_CONTEXT),
        (413, "context_length_exceeded", OVER_CONTEXT),
        (400, "unknown parameter", ""),
        (403, "flagged by moderation", FATAL),
    ],
)
def test_a_request_over_the_endpoints_context_is_a_kind_of_its_own(status: int, words: str, kind: str) -> None:
    response = httpx.Response(status, request=httpx.Request("POST", "http://a/v1"))
    assert failure_kind(openai.APIStatusError(words, response=response, body=None)) == kind
