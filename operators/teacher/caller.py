"""The actor that makes calls: it sends them to an engine or an endpoint, and stores each reply soon after it came."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import ray

from operators.teacher.calls import Call, Reply, failed, replies_table
from operators.teacher.config import TeacherConfig
from operators.teacher.deaths import Verdict
from operators.teacher.journal import Journal, Store
from operators.teacher.openai_backend import OpenAIEndpoint
from operators.teacher.turns import EngineDiedError, Turns

START_ATTEMPTS = 3  # for an engine whose machine is lost while the engine loads


class PooledEngine:
    """The engine that this caller has leased from the pool; if it dies, the next call leases another."""

    def __init__(self, caller: str, pool: Any, supervisor: Any, teacher: TeacherConfig) -> None:
        self._caller, self._pool, self._supervisor, self._teacher = caller, pool, supervisor, teacher
        self._engine: Any = None
        self._broken: Any = None  # a dead engine that has not been given back yet
        self._starting = asyncio.Lock()

    async def answer(self, call: Call) -> Reply:
        """Ask the engine.

        Raises:
            EngineDiedError: it died before it answered.
            RuntimeError: it does not start, or gives no token; the stage is closed.
        """
        engine = await self._started()
        try:
            reply: Reply = await engine.answer.remote(call, self._teacher)
        except ray.exceptions.RayActorError:
            if self._engine is engine:
                self._engine, self._broken = None, engine
            raise EngineDiedError from None
        except ray.exceptions.RayTaskError as error:  # a bug in our code, but no reason to lose the batch
            return failed(call, f"{type(error.cause).__name__}: {error.cause}")
        return reply

    async def _started(self) -> Any:
        async with self._starting:
            if self._engine is None:
                await asyncio.to_thread(self.start)
            return self._engine

    def start(self) -> None:
        """Lease an engine and block until it can answer.

        Raises:
            RuntimeError: it does not start; the stage is closed.
        """
        reason = ""
        for _ in range(START_ATTEMPTS):
            engine = ray.get(self._pool.lease.remote(self._caller, self._broken))
            self._broken = engine
            try:
                ray.get(engine.wait_until_ready.remote(self._teacher.first_token_timeout_s))
            except ray.exceptions.RayTaskError as error:
                reason = str(error.cause)
                break
            except ray.exceptions.RayActorError as error:
                reason = _why(error)
                if "creation task" in str(error) or "__init__" in str(error):
                    break  # it raised an error while it loaded, and a second engine would too
            else:
                self._engine, self._broken = engine, None
                return
        reason = f"the engine does not start: {reason}; look into its log"
        if self._supervisor is not None:
            ray.get(self._supervisor.close.remote(reason))
        raise RuntimeError(reason)


class Caller:
    """Ray Data actor, asynchronous: its batches overlap."""

    def __init__(self, teacher: TeacherConfig, pool: Any, store: Store | None) -> None:
        """Return when the engine can answer, because Ray Data gives calls to an actor as soon as this returns.

        Args:
            teacher: who answers.
            pool: actor of `engine_pool.EnginePool`; None for an endpoint.
            store: where replies are stored; None stores nothing and puts the replies into the result.
        """
        self._store = store
        self._supervisor = store.supervisor if store else None
        if pool is None:
            self._answer = OpenAIEndpoint(teacher).answer
        else:
            actor = str(ray.get_runtime_context().get_actor_id())
            engine = PooledEngine(actor, pool, self._supervisor, teacher)
            engine.start()
            self._answer = Turns(engine.answer, self._judge_death).reply
        self._journal = Journal(store.keep, teacher.batch_rows, teacher.commit_seconds) if store else None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer a batch of calls; yields its replies, without their texts if they are stored."""
        calls = batch.to_pylist()
        if self._supervisor is not None:
            still_open = set(await self._supervisor.open_calls.remote([call["call_key"] for call in calls]))
            calls = [call for call in calls if call["call_key"] in still_open]
        try:
            replies = await asyncio.gather(*(self._reply(call) for call in calls))
        finally:  # also when the stage is closed: replies are paid for, and this actor ends with its batch
            if self._journal is not None:
                await self._journal.flush()
        if self._journal is not None:
            replies = [{**reply, "reply": None} for reply in replies]
        yield replies_table(replies)

    async def _reply(self, call: Call) -> Reply:
        reply = await self._answer(call)
        if self._journal is not None:
            await self._journal.add(reply)
        return reply

    async def _judge_death(self, keys: list[str], survived: bool) -> Verdict:
        if self._supervisor is None:
            return Verdict(closed="the engine died")
        verdict: Verdict = await self._supervisor.died.remote(keys, survived)
        return verdict


def _why(error: BaseException) -> str:
    """The last non-empty line of the traceback that Ray puts into an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
