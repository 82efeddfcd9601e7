"""The OpenAI protocol: makes a request from a call, a reply from a completion, and a kind of failure from an error."""

import json
from collections.abc import Iterator
from typing import Any

from operators.teacher.calls import Call, Reply, answered, call_seed, failed, is_broken, is_cut, is_cut_in_thoughts
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BROKEN_OFF, BUSY, FATAL, LOST, NO_COMPLETION, OVER_CONTEXT, REFUSED, textless
from operators.teacher.prompt_tokens import num_prompt_tokens, num_text_tokens

COMPLAINTS = (429, 503, 529)
PASSING = (*COMPLAINTS, 502, 504)  # statuses that are due to the endpoint, not to the call; 500 may be either
REFUSALS = (401, 402, 403, 404)  # no key, no money, not allowed, no such model or address: every call would fail
# In what servers say of a prompt that is too long: vLLM and OpenAI, llama.cpp, Anthropic.
TOO_LONG = ("context_length", "context length", "context size", "prompt is too long")
SHOWN_CHARS = 80  # of an answer that is not a chat completion, or of a refusal
TEXTS = ("content", "reasoning_content", "reasoning")  # of a message: its answer and its thoughts


class NoCompletionError(ValueError):
    """The answer is not a chat completion; the message says what it is instead."""


def request_body(call: Call, teacher: TeacherConfig) -> dict[str, Any]:
    """The arguments of a chat completion, renamed and left out as the configuration says for this endpoint."""
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
    # Parameters that the client's method does not have go into `extra_body`.
    standard = {"temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "response_format"}
    extra = {name: named.pop(name) for name in [*named] if name not in standard}
    if teacher.chat_template_kwargs:
        extra["chat_template_kwargs"] = teacher.chat_template_kwargs
    extra |= teacher.extra_body
    body = {"model": teacher.model, "messages": json.loads(call["messages"]), **named}
    return {**body, "extra_body": extra} if extra else body


def read_completion(completion: Any, call: Call, teacher: TeacherConfig) -> Reply:
    """The reply in a chat completion; missing token counts are estimated (`_generated`).

    A reasoning model's answer is in `content` and its thoughts are in `reasoning_content` (`reasoning` elsewhere). If
    there is no content, the answer may be in there: some reasoning parsers take a reply without thoughts for thoughts.

    A reply without text is a failure, and its tokens count. So is a reply that the limit cut off while the model was
    thinking: a draft in its thoughts is not its answer. A refusal in `message.refusal`, as OpenAI's structured outputs
    have it, is a failure that is final.
    """
    choice = completion.choices[0]
    message, reason = choice.message, str(choice.finish_reason or "stop")
    texts = [_text_of(getattr(message, name, None)) for name in TEXTS]
    text = next((text for text in texts if text.strip()), "")
    refusal = _text_of(getattr(message, "refusal", None))
    usage = getattr(completion, "usage", None)
    prompt = _count_of(usage, "prompt_tokens") or num_prompt_tokens(call["messages"], teacher)
    generated = _generated(usage, [*texts, refusal], reason, call, teacher)
    if reason == "content_filter":
        return failed(call, f"{FATAL}the endpoint's content filter stopped the reply", prompt, generated)
    if is_broken(reason):
        return failed(call, f"{BROKEN_OFF}{reason}", prompt, generated)
    if refusal.strip() and not _text_of(getattr(message, "content", None)).strip():
        words = " ".join(refusal.split())[:SHOWN_CHARS]
        return failed(call, f"{FATAL}the model refuses to answer: {words}", prompt, generated)
    if not text or is_cut_in_thoughts(texts[0], reason):
        return failed(call, textless(reason), prompt, generated)
    return answered(call, text, reason, prompt, generated)


def _generated(usage: Any, texts: list[str], reason: str, call: Call, teacher: TeacherConfig) -> int:
    """The tokens that a reply cost.

    Some endpoints count thoughts only in the total. Without counts it is an upper bound for what came back: its texts,
    or `max_tokens` if it was cut off or nothing came. Only thoughts that an endpoint neither counts nor sends are lost.
    """
    counted, prompt = _count_of(usage, "completion_tokens"), _count_of(usage, "prompt_tokens")
    if counted:
        return max(counted, _count_of(usage, "total_tokens") - prompt) if prompt else counted
    came = sum(num_text_tokens(text, teacher) for text in {*texts})  # some endpoints send the thoughts under two names
    if "max_tokens" in teacher.leave_out_parameters:  # nothing limited the reply
        return came or int(call["max_tokens"])
    return min(came, call["max_tokens"]) if came and not is_cut(reason) else int(call["max_tokens"])


def failure_kind(error: Exception) -> str:
    """The beginning of the error for a failed request, one of those in `failures`."""
    import openai

    words = f"{error} {getattr(error, 'body', '')}".lower()
    # By name, because the client decides which HTTP library raises them.
    causes = {type(cause).__name__ for cause in _causes(error)}
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 403 and ("moderation" in words or "flagged" in words):
            return FATAL
        if error.status_code in REFUSALS or (error.status_code == 429 and "insufficient_quota" in words):
            return REFUSED
        if error.status_code in PASSING:
            return BUSY
        too_long = any(sign in words for sign in TOO_LONG)
        return OVER_CONTEXT if error.status_code in (400, 413) and too_long else ""
    if isinstance(error, openai.APITimeoutError):
        return REFUSED if "ConnectTimeout" in causes else ""
    if isinstance(error, openai.APIConnectionError):
        return REFUSED if "ConnectError" in causes else LOST
    return NO_COMPLETION if isinstance(error, NoCompletionError | json.JSONDecodeError) else ""


def require_completion(completion: Any) -> None:
    """Refuse answers of status 200 from a proxy, a wrong address or a failed router.

    Raises:
        NoCompletionError: the answer is not a chat completion; the message has its first words.
    """
    if getattr(completion, "choices", None):
        return
    if isinstance(completion, str):
        raise NoCompletionError(f"a text that begins with {completion.strip()[:SHOWN_CHARS]!r}")
    said = getattr(completion, "error", None)
    words = said.get("message") if isinstance(said, dict) else said
    raise NoCompletionError(str(words)[:SHOWN_CHARS] if words else "an object without choices")


def _text_of(content: Any) -> str:
    """A text unchanged, or the joined text parts of a list: some reasoning models answer in parts."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def words_of(error: Exception) -> str:
    """The text of an error; a connection error has its reason only in its cause."""
    cause = f" ({error.__cause__})" if type(error).__name__ == "APIConnectionError" and error.__cause__ else ""
    headers = getattr(getattr(error, "response", None), "headers", {})
    later = headers.get("retry-after")
    return f"{error}{cause}" + (f"; it asks to come back after {later} s" if later and later.isdigit() else "")


def _count_of(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
