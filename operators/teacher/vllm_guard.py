"""Runs batches on an engine that may die of them: says what begins, and leaves out what is known to kill.

See `supervisor` for the protocol. The engine is Ray's own vLLM stage; only the order of its calls is ours.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from operators.teacher.supervisor import FATAL

PROBE_TOKENS = 8  # of the first prompt: the head of the chat template, in which no row has a part

Row = dict[str, Any]
Generate = Callable[[Row], Awaitable[Any]]


class FirstToken:
    """An engine that has loaded may still hang at its first call: one token, in time, before any batch begins."""

    def __init__(self, generate: Generate, supervisor: Any, timeout_s: float) -> None:
        self._generate, self._supervisor, self._timeout_s = generate, supervisor, timeout_s
        self._answered, self._turn = False, asyncio.Lock()

    async def wait_for_first_token(self, row: Row) -> None:
        """Return once the engine has answered its first call, which is cut from `row`.

        Raises:
            RuntimeError: it has not in time; the stage is closed.
        """
        async with self._turn:
            if self._answered:
                return
            sampling = {name: value for name, value in row["sampling_params"].items() if name != "structured_outputs"}
            head = list(row["tokenized_prompt"][:PROBE_TOKENS])
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._generate(
                        {**row, "tokenized_prompt": head, "sampling_params": {**sampling, "max_tokens": 1}}
                    )
            except TimeoutError:
                reason = (
                    "the engine has started but gave no token within "
                    f"teacher.first_token_timeout_s: {self._timeout_s:g} s; look into its log, or raise it"
                )
                await self._supervisor.close.remote(reason)
                raise RuntimeError(reason) from None
            self._answered = True


def guarded(engine: type[Any], supervisor: Any, first_token_timeout_s: float) -> type[Any]:  # noqa: C901 - one short class
    """A subclass of `ray.data.llm`'s engine stage whose batches are known to the supervisor.

    Args:
        engine: Ray's stage.
        supervisor: actor of `supervisor.Supervisor`.
        first_token_timeout_s: how long the first token may take.

    Raises in the stage:
        RuntimeError: the supervisor allows no further call.
    """

    class GuardedEngine(engine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._deadly: set[str] = set()
            self._turn = asyncio.Lock()  # batches share the engine; only one of them at a time takes its calls in turn
            self._generate, self.llm.generate_async = self.llm.generate_async, self._generate_unless_deadly
            self._first_token = FirstToken(self._generate, supervisor, first_token_timeout_s)

        async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
            start = await supervisor.begin.remote([row["call_key"] for row in batch])
            if start.closed:
                raise RuntimeError(start.closed)
            await self._first_token.wait_for_first_token(batch[0])
            self._deadly |= start.deadly
            if not start.one_by_one:
                async for output in engine.udf(self, batch):
                    yield output
                return
            for row in batch:
                key = row["call_key"]
                async with self._turn:
                    if key not in self._deadly:
                        await supervisor.begin_turn.remote(key)
                    async for output in engine.udf(self, [row]):
                        yield output
                    if key not in self._deadly:
                        await supervisor.end_turn.remote(key)

        async def _generate_unless_deadly(self, row: Row) -> Any:
            if row["call_key"] in self._deadly:
                raise RuntimeError(FATAL)  # the stage makes an error row of it
            return await self._generate(row)

    return GuardedEngine
