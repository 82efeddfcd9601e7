"""A teacher behind an OpenAI-compatible endpoint: one asynchronous client per actor.

The package `openai` retries temporary errors (429, 5xx, lost connections) with growing pauses and obeys Retry-After; it
does not retry other errors (other 4xx). This module adds two limits: a rate, and a number of requests in flight. That
number halves when the endpoint complains, and otherwise grows by one per round (AIMD, as in TCP).
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from aiolimiter import AsyncLimiter

from operators.redact import without_secret
from operators.teacher.calls import Call, Reply, failed
from operators.teacher.chat_completions import (
    COMPLAINTS,
    failure_kind,
    read_completion,
    request_body,
    require_completion,
    words_of,
)
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import REFUSED

MINUTE = 60.0


class Slots:
    """Limits the number of requests in flight; `async with` takes a slot.

    A complaint halves the number, at most once in `settle_s` seconds, because requests that were sent before the first
    complaint bring further ones. Each success adds 1/number, so one per round.
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
        """Adapt the number of slots to the status of a response."""
        if status in COMPLAINTS:
            now = self._clock()
            if now - self._complained >= self._settle_s:
                self._complained = now
                self.limit = max(1.0, self.limit / 2)
        elif status < 400:
            self.limit = min(float(self._most), self.limit + 1 / self.limit)


class OpenAIEndpoint:
    """The client of one endpoint. Its key is read from the worker's environment, never stored, and cut from errors."""

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
            api_key=self._key or "none",  # local servers need no key, but the client requires one
            base_url=teacher.base_url or None,
            max_retries=teacher.max_retries,
            timeout=teacher.request_timeout_s,
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, timeout=teacher.request_timeout_s),
        )

    async def answer(self, call: Call) -> Reply:
        """Make one call; whatever the endpoint does becomes a reply or a failure, never an exception."""
        try:
            async with self._slots:
                if self._refused:  # the reason of a refusal holds for all calls
                    return failed(call, self._refused)
                completion = await self._client.chat.completions.create(**request_body(call, self._teacher))
            require_completion(completion)
            return read_completion(completion, call, self._teacher)
        except Exception as error:  # noqa: BLE001 - an endpoint may answer anything, and this must not end the run
            text = f"{failure_kind(error)}{type(error).__name__}: {words_of(error)}"
            text = without_secret(text, self._key)
            if text.startswith(REFUSED):
                self._refused = text
            return failed(call, text)

    async def _wait(self, _request: Any) -> None:
        if self._rate is not None:
            await self._rate.acquire()

    async def _hear(self, response: Any) -> None:
        self._slots.heard(response.status_code)
