"""The actor that makes calls, with engines that hang, do not load or die, without Ray."""

import asyncio
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators.teacher.caller import Caller, PooledEngine
from operators.teacher.calls import CALLS, Call, Reply, answered
from operators.teacher.config import TeacherConfig
from operators.teacher.journal import Store
from operators.teacher.turns import EngineDiedError, StageClosedError

TEACHER = TeacherConfig(backend="scripted", model="mortal", first_token_timeout_s=5)
CALL = {"call_key": "k", "row_id": "r", "messages": "[]", "schema": "", "max_tokens": 8}


class Method:
    """Replaces a method of an actor: the result of `.remote()` can be awaited or passed to `ray.get`."""

    def __init__(self, result: Any) -> None:
        self.result, self.seen = result, []

    def remote(self, *arguments: Any) -> Any:
        self.seen.append(arguments)
        return Result(self.result(*arguments) if callable(self.result) else self.result)


class Result:
    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def __await__(self) -> Generator[None, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self.get()


@pytest.fixture(autouse=True)
def get_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.teacher.caller.ray.get", Result.get)


class Engine:
    def __init__(self, ready: Any = None, answer: Any = None) -> None:
        self.wait_until_ready, self.answer = Method(ready), Method(answer)


class Pool:
    def __init__(self, *engines: Engine) -> None:
        waiting = list(engines)
        self.lease = Method(lambda _caller, _broken: waiting.pop(0))


class Supervisor:
    def __init__(self) -> None:
        self.close = Method(None)


def task_error(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("answer", "traceback", cause)


def test_an_engine_that_dies_is_given_back_and_another_answers() -> None:
    said = answered(CALL, "said", "stop", 1, 1)
    dead, alive = Engine(answer=ray.exceptions.RayActorError(error_msg="gone")), Engine(answer=said)
    pool = Pool(dead, alive)
    engine = PooledEngine("a", pool, Supervisor(), TEACHER)

    async def twice() -> Any:
        with pytest.raises(EngineDiedError):
            await engine.answer(CALL)
        return await engine.answer(CALL)

    assert asyncio.run(twice()) == said
    assert pool.lease.seen == [("a", None), ("a", dead)]


@pytest.mark.parametrize(
    "ready",
    [
        task_error(TimeoutError("it has loaded but gave no token")),
        ray.exceptions.RayActorError(error_msg="raised in __init__"),
    ],
    ids=["hangs", "does not load"],
)
def test_an_engine_that_does_not_start_closes_the_stage_with_its_words(ready: Exception) -> None:
    supervisor = Supervisor()
    with pytest.raises(RuntimeError, match="the engine does not start"):
        asyncio.run(PooledEngine("a", Pool(Engine(ready=ready)), supervisor, TEACHER).answer(CALL))
    [[reason]] = supervisor.close.seen
    assert "look into its log" in reason


def test_a_caller_leases_under_the_id_of_its_actor_which_a_restart_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_actor_id=lambda: "0f")
    monkeypatch.setattr("operators.teacher.caller.ray.get_runtime_context", lambda: context)
    pool = Pool(Engine(), Engine())
    for _ in range(2):
        Caller(TEACHER, pool, None)
    assert pool.lease.seen == [("0f", None)] * 2


def test_losing_a_machine_while_an_engine_loads_does_not_end_the_stage() -> None:
    gone = [Engine(ready=ray.exceptions.RayActorError(error_msg="the node died")) for _ in range(2)]
    said = answered(CALL, "said", "stop", 1, 1)
    engine = PooledEngine("a", Pool(*gone, Engine(answer=said)), Supervisor(), TEACHER)
    assert asyncio.run(engine.answer(CALL)) == said


def test_a_batch_that_ends_with_its_stage_stores_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endpoint:
        def __init__(self, teacher: TeacherConfig) -> None:
            pass

        async def answer(self, call: Call) -> Reply:
            if call["call_key"] == "k":
                return answered(call, "said", "stop", 1, 1)
            raise StageClosedError("closed")

    stored: list[str] = []
    monkeypatch.setattr("operators.teacher.caller.OpenAIEndpoint", Endpoint)
    monkeypatch.setattr("operators.teacher.journal.ray.get", Result.get)
    supervisor = Supervisor()
    supervisor.open_calls, supervisor.settle = Method(lambda keys: keys), Method(None)  # type: ignore[attr-defined]
    store = Store(lambda replies, _: stored.extend(replies["reply"].to_pylist()) or "file", supervisor)
    batch = pa.Table.from_pylist([CALL, {**CALL, "call_key": "other"}], schema=CALLS)

    async def answer() -> None:
        async for _ in Caller(TEACHER, None, store)(batch):
            pass

    with pytest.raises(StageClosedError):
        asyncio.run(answer())
    assert stored == ["said"]
