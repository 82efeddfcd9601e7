"""Sends calls to one engine: all together or, after its death, in groups that get the next engine for themselves."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from operators.teacher.calls import Call, Reply, failed
from operators.teacher.deaths import Verdict
from operators.teacher.failures import CRASHED

Answer = Callable[[Call], Awaitable[Reply]]


class EngineDiedError(Exception):
    """The engine died while it held a call; whether it would have answered is unknown."""


class StageClosedError(RuntimeError):
    """No further call is to be made; the message says why."""


class Turns:
    """The calls of one engine and of those that replace it."""

    def __init__(self, answer: Answer, judge_death: Callable[[list[str], bool], Awaitable[Verdict]]) -> None:
        """Start with all calls allowed.

        Args:
            answer: asks the engine; raises EngineDiedError.
            judge_death: gets the keys of the calls that were on an engine when it died, and whether any call was
                answered since the last death; returns how to continue.
        """
        self._answer, self._judge_death = answer, judge_death
        self._on_engine: set[str] = set()
        self._died: list[str] = []  # calls of the dead engine that have raised EngineDiedError so far
        self._groups: deque[tuple[str, ...]] = deque()  # groups that wait for the engine
        self._turn: set[str] = set()  # unfinished calls of the group that has the engine
        self._deadly: set[str] = set()
        self._survived = False
        self._closed = ""
        self._changed = asyncio.Condition()

    async def reply(self, call: Call) -> Reply:
        """The reply to a call, from the first engine that survives it; a failure if the call crashes engines.

        Raises:
            StageClosedError: the stage is closed.
        """
        key = call["call_key"]
        while True:
            await self._enter(key)
            if key in self._deadly:
                return failed(call, CRASHED)
            died = True
            try:
                reply = await self._answer(call)
                died, self._survived = False, self._survived or not reply["error"]
            except EngineDiedError:
                reply = None
            finally:
                await self._leave(key, died=died)
            if reply is not None:
                return reply

    async def _enter(self, key: str) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or key in self._deadly or self._may_enter(key))
            if self._closed:
                raise StageClosedError(self._closed)
            if key not in self._deadly:
                self._on_engine.add(key)

    def _may_enter(self, key: str) -> bool:
        if self._died:  # the dead engine's other calls have not raised their error yet
            return False
        return key in self._turn if self._turn or self._groups else True

    async def _leave(self, key: str, *, died: bool) -> None:
        async with self._changed:
            self._on_engine.discard(key)
            if died:
                self._died.append(key)
            elif key in self._turn:
                self._turn.discard(key)
            if self._died and not self._on_engine:
                await self._settle_death()
            if not self._turn and self._groups and not self._on_engine:
                self._turn = set(self._groups.popleft())
            self._changed.notify_all()

    async def _settle_death(self) -> None:
        verdict = await self._judge_death(self._died, self._survived)
        self._survived = False
        waiting = self._turn - set(self._died)  # calls of the current group that had not begun
        if waiting:
            self._groups.appendleft(tuple(waiting))
        self._groups.extend(verdict.groups)
        self._deadly |= verdict.deadly
        self._closed = self._closed or verdict.closed
        self._died, self._turn = [], set()
