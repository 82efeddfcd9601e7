"""A teacher behind an OpenAI-compatible endpoint: one asynchronous client an actor; `openai` retries and backs off."""

import asyncio
import json
import os
from typing import Any

import pyarrow as pa

from operators.calls import REPLIES, call_seed

MAX_RETRIES = 6
TIMEOUT_S = 600.0
ERROR_CHARS = 500


class OpenAIEndpoint:
    """Ray Data actor; the key is read from the environment of the worker and kept nowhere."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        api_key_env: str,
        temperature: float,
        top_p: float,
        concurrent_requests: int,
    ) -> None:
        from openai import AsyncOpenAI

        key = os.environ.get(api_key_env) or "none"  # local servers ask for no key, the client insists on one
        self._client = AsyncOpenAI(api_key=key, base_url=base_url or None, max_retries=MAX_RETRIES, timeout=TIMEOUT_S)
        self._sampling = {"model": model, "temperature": temperature, "top_p": top_p}
        self._slots = asyncio.Semaphore(concurrent_requests)

    async def __call__(self, batch: pa.Table) -> Any:
        """Answer a batch; yields one table in the order of the calls."""
        replies = await asyncio.gather(*(self._answer(call) for call in batch.to_pylist()))
        yield pa.Table.from_pylist(replies, schema=REPLIES)

    async def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        from openai import OpenAIError

        reply: dict[str, Any] = {"call_key": call["call_key"], "row_id": call["row_id"]}
        request: dict[str, Any] = {**self._sampling, "max_tokens": call["max_tokens"]}
        request["messages"] = json.loads(call["messages"])
        request["seed"] = call_seed(call["call_key"])
        if call["schema"]:
            schema = {"name": "reflection", "schema": json.loads(call["schema"]), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            async with self._slots:
                completion = await self._client.chat.completions.create(**request)
            choice, usage = completion.choices[0], completion.usage
        except (OpenAIError, IndexError, TypeError, ValueError) as error:
            return {
                **reply,
                "prompt_tokens": 0,
                "generated_tokens": 0,
                "error": f"{type(error).__name__}: {error}"[:500],
            }
        return {
            **reply,
            "reply": choice.message.content or "",
            "finish_reason": choice.finish_reason or "stop",
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "generated_tokens": usage.completion_tokens if usage else 0,
            "error": "",
        }
