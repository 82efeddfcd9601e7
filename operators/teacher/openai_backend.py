"""A teacher behind an OpenAI-compatible endpoint: one asynchronous client an actor.

`openai` retries what may pass (429, 5xx, lost connections) with growing pauses and obeys Retry-After; it does not
retry what cannot (other 4xx). Around it, two governors of ours: a rate limit, and a number of requests in flight that
halves when the endpoint complains and grows by one a round while it does not (AIMD, as TCP does).
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import ray
from aiolimiter import AsyncLimiter
from ray.data import Dataset

from operators.teacher.calls import ERROR_CHARS, REPLIES, call_seed
from operators.teacher.config import TeacherConfig

COMPLAINTS = (429, 503, 529)
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
    """Ray Data actor; the key is read from the environment of the worker, kept nowhere and struck from errors."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        api_key_env: str,
        temperature: float,
        top_p: float,
        concurrent_requests: int,
        requests_per_minute: float,
        request_timeout_s: float,
        max_retries: int,
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self._key = os.environ.get(api_key_env) or "none"  # local servers ask for no key, the client insists on one
        self._slots = Slots(concurrent_requests)
        self._rate = AsyncLimiter(1, MINUTE / requests_per_minute) if requests_per_minute else None
        hooks: dict[str, list[Callable[..., Awaitable[None]]]] = {"request": [self._wait], "response": [self._hear]}
        self._client = AsyncOpenAI(
            api_key=self._key,
            base_url=base_url or None,
            max_retries=max_retries,
            timeout=request_timeout_s,
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, timeout=request_timeout_s),
        )
        self._sampling = {"model": model, "temperature": temperature, "top_p": top_p}

    async def __call__(self, batch: pa.Table) -> Any:
        """Answer a batch; yields one table in the order of the calls."""
        replies = await asyncio.gather(*(self._answer(call) for call in batch.to_pylist()))
        yield pa.Table.from_pylist(replies, schema=REPLIES)

    async def _wait(self, _request: Any) -> None:
        if self._rate is not None:
            await self._rate.acquire()

    async def _hear(self, response: Any) -> None:
        self._slots.heard(response.status_code)

    async def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = {"call_key": call["call_key"], "row_id": call["row_id"]}
        try:
            async with self._slots:
                completion = await self._client.chat.completions.create(**self._request(call))
            choice, usage = completion.choices[0], completion.usage
            text, reason = choice.message.content, choice.finish_reason or "stop"
            if not isinstance(text, str) or not text:
                raise ValueError(f"a reply without text, finish reason {reason}")
        except Exception as error:  # noqa: BLE001 - an endpoint may answer anything; no answer of it may end the run
            text = f"{type(error).__name__}: {error}".replace(self._key, "<key>")
            return {**reply, "prompt_tokens": 0, "generated_tokens": 0, "error": text[:ERROR_CHARS]}
        return {
            **reply,
            "reply": text,
            "finish_reason": reason,
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "generated_tokens": usage.completion_tokens if usage else 0,
            "error": "",
        }

    def _request(self, call: dict[str, Any]) -> dict[str, Any]:
        request: dict[str, Any] = {
            **self._sampling,
            "messages": json.loads(call["messages"]),
            "max_tokens": call["max_tokens"],
            "seed": call_seed(call["call_key"]),
        }
        if call["schema"]:
            schema = {"name": "reflection", "schema": json.loads(call["schema"]), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


_ENDPOINT_SETTINGS = {
    "model",
    "base_url",
    "api_key_env",
    "temperature",
    "top_p",
    "concurrent_requests",
    "requests_per_minute",
    "request_timeout_s",
    "max_retries",
}


def generate_openai(calls: Dataset, teacher: TeacherConfig, _supervisor: Any) -> Dataset:
    """Answer calls by an endpoint; columns as of `generate`."""
    return calls.map_batches(
        OpenAIEndpoint,
        fn_constructor_kwargs=teacher.model_dump(include=_ENDPOINT_SETTINGS),
        compute=ray.data.ActorPoolStrategy(size=teacher.replicas if isinstance(teacher.replicas, int) else 1),
        batch_size=teacher.batch_rows,
        batch_format="pyarrow",
        num_cpus=0.5,
    )
