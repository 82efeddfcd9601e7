"""A teacher behind an OpenAI-compatible endpoint: one asynchronous client an actor.

`openai` retries what may pass (429, 5xx, lost connections) with growing pauses and obeys Retry-After; it does not
retry what cannot (other 4xx). Two limits are added here: a rate, and a number of requests in flight that halves when
the endpoint complains and grows by one a round while it does not (AIMD, as TCP does).
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from aiolimiter import AsyncLimiter

from operators.teacher.calls import Call, Reply, answered, call_seed, failed
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import FATAL, LOST, REFUSED, TEXTLESS
from operators.teacher.prompt_tokens import num_prompt_tokens, num_text_tokens

COMPLAINTS = (429, 503, 529)
REFUSALS = (401, 402, 403, 404)  # no key, no money, not allowed, no such model or address: the same for every call
MINUTE = 60.0


class Slots:
    """How many requests may be in flight; `async with` takes a slot.

    A complaint halves the number, at most once in `settle_s`: answers to requests that were sent before it say nothing
    new. Each success adds 1/number, which is one a round.
    """

    def __init__(self, most: int, settle_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = float(most)
        self._most, self._settle_s, self._clock = most, settle_s, clock
        self._in_flight = 0
        self._complained = float("-inf")
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        async with self._changed:
            await self._changed.wait_for(lambda: self._in_flight < int(self.limit))
            self._in_flight += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def heard(self, status: int) -> None:
        """Take note of the status of a response."""
        if status in COMPLAINTS:
            now = self._clock()
            if now - self._complained >= self._settle_s:
                self._complained = now
                self.limit = max(1.0, self.limit / 2)
        elif status < 400:
            self.limit = min(float(self._most), self.limit + 1 / self.limit)


class OpenAIEndpoint:
    """The key is read from the environment of the worker, kept nowhere and struck from errors."""

    def __init__(self, teacher: TeacherConfig) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self._teacher = teacher
        self._key = os.environ.get(teacher.api_key_env, "")
        self._slots = Slots(teacher.concurrent_requests)
        rate = teacher.requests_per_minute
        self._rate = AsyncLimiter(1, MINUTE / rate) if rate else None
        self._refused = ""
        hooks: dict[str, list[Callable[..., Awaitable[None]]]] = {"request": [self._wait], "response": [self._hear]}
        self._client = AsyncOpenAI(
            api_key=self._key or "none",  # local servers ask for no key, and the client insists on one
            base_url=teacher.base_url or None,
            max_retries=teacher.max_retries,
            timeout=teacher.request_timeout_s,
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, timeout=teacher.request_timeout_s),
        )

    async def answer(self, call: Call) -> Reply:
        """One call; whatever the endpoint does is a reply or a failure, never an exception."""
        try:
            async with self._slots:
                if self._refused:  # what is refused for one call is refused for all
                    return failed(call, self._refused)
                completion = await self._client.chat.completions.create(**request_body(call, self._teacher))
            return read_completion(completion, call, self._teacher)
        except Exception as error:  # noqa: BLE001 - an endpoint may answer anything; no answer of it may end the run
            text = f"{failure_kind(error)}{type(error).__name__}: {_words(error)}"
            text = text.replace(self._key, "<key>") if self._key else text
            if text.startswith(REFUSED):
                self._refused = text
            return failed(call, text)

    async def _wait(self, _request: Any) -> None:
        if self._rate is not None:
            await self._rate.acquire()

    async def _hear(self, response: Any) -> None:
        self._slots.heard(response.status_code)


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
    texts = (getattr(message, name, None) for name in ("content", "reasoning_content", "reasoning"))
    text = next((text for text in texts if isinstance(text, str) and text.strip()), "")
    usage = getattr(completion, "usage", None)
    prompt = _count_of(usage, "prompt_tokens") or num_prompt_tokens(call["messages"], teacher)
    generated = _count_of(usage, "completion_tokens") or min(num_text_tokens(text, teacher), call["max_tokens"])
    if reason == "content_filter":
        return failed(call, f"{FATAL}the endpoint's content filter stopped the reply", prompt, generated)
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
        too_long = "context_length" in words or "context length" in words
        return FATAL if error.status_code in (400, 413) and too_long else ""
    if isinstance(error, openai.APITimeoutError):
        return REFUSED if "ConnectTimeout" in causes else ""
    if isinstance(error, openai.APIConnectionError):
        return REFUSED if "ConnectError" in causes else LOST
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: Exception) -> str:
    """What an error says; a connection error says why only in its cause."""
    cause = f" ({error.__cause__})" if type(error).__name__ == "APIConnectionError" and error.__cause__ else ""
    return f"{error}{cause}"


def _count_of(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
