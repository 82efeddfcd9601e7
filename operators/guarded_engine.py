"""Runs batches on an engine that may die of them: says what begins, and leaves out what is known to kill.

See `supervisor` for the protocol. The engine is Ray's own vLLM stage; only the order of its calls is ours.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from operators.supervisor import FATAL

Row = dict[str, Any]


def guarded(engine: type[Any], supervisor: Any) -> type[Any]:  # noqa: C901 - three short methods of one class
    """A subclass of `ray.data.llm`'s engine stage whose batches are known to the supervisor.

    Raises in the stage:
        RuntimeError: the supervisor allows no further call.
    """

    class GuardedEngine(engine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._deadly: set[str] = set()
            self._turn = asyncio.Lock()  # batches share the engine; only one of them at a time takes its calls in turn
            self._generate, self.llm.generate_async = self.llm.generate_async, self._generate_unless_deadly

        async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
            start = await supervisor.begin.remote([row["call_key"] for row in batch])
            if start.closed:
                raise RuntimeError(start.closed)
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
