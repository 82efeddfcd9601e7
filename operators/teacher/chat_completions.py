"""The OpenAI protocol: a call as the body of a request, what comes back as a reply, and what its errors mean."""

import json
from collections.abc import Iterator
from typing import Any

from operators.teacher.calls import Call, Reply, answered, call_seed, failed, is_broken
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BROKEN_OFF, BUSY, FATAL, LOST, NO_COMPLETION, REFUSED, TEXTLESS
from operators.teacher.prompt_tokens import num_prompt_tokens, num_text_tokens

COMPLAINTS = (429, 503, 529)
PASSING = (*COMPLAINTS, 502, 504)  # the endpoint's state, not the call: 500 may be either
REFUSALS = (401, 402, 403, 404)  # no key, no money, not allowed, no such model or address: the same for every call
SHOWN_CHARS = 80  # of what answers in place of a chat completion


class NoCompletionError(ValueError):
    """What came back is no chat completion; the message says what it is instead."""


def request_body(call: Call, teacher: TeacherConfig) -> dict[str, Any]:
    """The arguments of a chat completion, with the names that the endpoint knows and without those it refuses."""
    parameters: dict[str, Any] = {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": call["max_tokens"],
        "seed": call_seed(call["call_key"]),
    }
    parameters |= {name: getattr(teacher, name) for name in ("top_k", "min_p") if getattr(teacher, name)}
    parameters |= {"stop": list(teacher.stop)} if teacher.stop else {}
    for name in teacher.leave_out_parameters:
        parameters.pop(name, None)
    names = {str(name): other for name, other in teacher.rename_parameters.items()}
    named = {names.get(name, name): value for name, value in parameters.items()}
    if call["schema"] and teacher.response_format == "json_schema":
        schema = {"name": "reflection", "schema": json.loads(call["schema"]), "strict": True}
        named["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif call["schema"] and teacher.response_format == "json_object":
        named["response_format"] = {"type": "json_object"}
    # What the client's method has no argument for goes into the body by itself.
    standard = {"temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "response_format"}
    extra = {name: named.pop(name) for name in [*named] if name not in standard}
    if teacher.chat_template_kwargs:
        extra["chat_template_kwargs"] = teacher.chat_template_kwargs
    extra |= teacher.extra_body
    body = {"model": teacher.model, "messages": json.loads(call["messages"]), **named}
    return {**body, "extra_body": extra} if extra else body


def read_completion(completion: Any, call: Call, teacher: TeacherConfig) -> Reply:
    """The reply in a chat completion; token counts that it lacks are estimated, never below what they can be.

    A reasoning model's answer is in `content` and its thoughts are in `reasoning_content` (`reasoning` elsewhere). If
    there is no content, the answer may stand there: a server's reasoning parser takes a reply without thoughts for one.

    A reply without text is a failure that has cost its tokens: a reasoning model may think until the limit.
    """
    choice = completion.choices[0]
    message, reason = choice.message, str(choice.finish_reason or "stop")
    texts = (_text_of(getattr(message, name, None)) for name in ("content", "reasoning_content", "reasoning"))
    text = next((text for text in texts if text.strip()), "")
    usage = getattr(completion, "usage", None)
    prompt = _count_of(usage, "prompt_tokens") or num_prompt_tokens(call["messages"], teacher)
    generated = _count_of(usage, "completion_tokens") or min(num_text_tokens(text, teacher), call["max_tokens"])
    if reason == "content_filter":
        return failed(call, f"{FATAL}the endpoint's content filter stopped the reply", prompt, generated)
    if is_broken(reason):
        return failed(call, f"{BROKEN_OFF}{reason}", prompt, generated)
    if not text:
        return failed(call, f"{TEXTLESS}{reason}", prompt, generated)
    return answered(call, text, reason, prompt, generated)


def failure_kind(error: Exception) -> str:
    """How the error of a request opens: see `failures`."""
    import openai

    words = f"{error} {getattr(error, 'body', '')}".lower()
    # By name, because it is the client's choice which HTTP library raises them.
    causes = {type(cause).__name__ for cause in _causes(error)}
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 403 and ("moderation" in words or "flagged" in words):
            return FATAL
        if error.status_code in REFUSALS or (error.status_code == 429 and "insufficient_quota" in words):
            return REFUSED
        if error.status_code in PASSING:
            return BUSY
        too_long = "context_length" in words or "context length" in words
        return FATAL if error.status_code in (400, 413) and too_long else ""
    if isinstance(error, openai.APITimeoutError):
        return REFUSED if "ConnectTimeout" in causes else ""
    if isinstance(error, openai.APIConnectionError):
        return REFUSED if "ConnectError" in causes else LOST
    return NO_COMPLETION if isinstance(error, NoCompletionError | json.JSONDecodeError) else ""


def require_completion(completion: Any) -> None:
    """Refuse what a proxy, a wrong address or a router that failed answers with status 200.

    Raises:
        NoCompletionError: with the first words of it.
    """
    if getattr(completion, "choices", None):
        return
    if isinstance(completion, str):
        raise NoCompletionError(f"a text that begins with {completion.strip()[:SHOWN_CHARS]!r}")
    said = getattr(completion, "error", None)
    words = said.get("message") if isinstance(said, dict) else said
    raise NoCompletionError(str(words)[:SHOWN_CHARS] if words else "an object without choices")


def _text_of(content: Any) -> str:
    """A text as it is, the text parts of a list joined: some reasoning models answer in parts."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def words_of(error: Exception) -> str:
    """What an error says; a connection error says why only in its cause."""
    cause = f" ({error.__cause__})" if type(error).__name__ == "APIConnectionError" and error.__cause__ else ""
    headers = getattr(getattr(error, "response", None), "headers", {})
    later = headers.get("retry-after")
    return f"{error}{cause}" + (f"; it asks to come back after {later} s" if later and later.isdigit() else "")


def _count_of(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
