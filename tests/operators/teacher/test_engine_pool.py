"""The pool hands out idle engines before it starts new ones, replaces dead ones, and stops those in the way."""

from types import SimpleNamespace
from typing import Any

import pytest

from operators.teacher import engine_pool
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import EnginePool, EngineSpec, pool_of
from operators.teacher.generate import engine_spec


class Engine:
    class stop:  # noqa: N801 - replaces a method of an actor
        @staticmethod
        def remote() -> str:
            return "stopped"


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    dead: list[Any] = []
    monkeypatch.setattr(engine_pool.ray, "kill", dead.append)
    monkeypatch.setattr(engine_pool.ray, "wait", lambda waiting, **_: (waiting, []))
    return dead


def pool(most: int) -> EnginePool:
    return EnginePool(EngineSpec(lambda: (Engine(), None), {}, {"CPU": 1.0}, most))


def test_the_engine_of_the_last_stage_serves_the_next(killed: list[Any]) -> None:
    engines = pool(2)
    first = engines.lease("a")
    engines.end_stage()
    assert engines.lease("b") is first
    assert engines.lease("c") is not first
    assert engines.starts() == 2


def test_a_dead_engine_is_replaced_once(killed: list[Any]) -> None:
    engines = pool(1)
    first = engines.lease("a")
    second = engines.lease("a", first)
    assert second is not first
    assert killed == [first]
    assert engines.starts() == 2


def test_no_more_engines_are_started_than_allowed(killed: list[Any]) -> None:
    engines = pool(2)
    leased = {id(engines.lease(caller)) for caller in "abcde"}
    assert len(leased) == engines.starts() == 2


def test_a_caller_that_was_restarted_gives_back_what_it_held(killed: list[Any]) -> None:
    engines = pool(2)
    first, second = engines.lease("a"), engines.lease("b")
    assert engines.lease("b") is second
    assert engines.lease("b", second) not in (first, second)  # it died too: the caller finds out, as with any engine
    assert (killed, engines.starts()) == ([second], 3)
    later = [engines.lease(caller) for caller in "cdef"]
    assert later.count(first) == 2, "every engine serves as many callers"


def test_a_restart_leaves_the_engine_to_another_caller(killed: list[Any]) -> None:
    engines = pool(3)
    first = engines.lease("a")
    second = engines.lease("b")
    assert engines.lease("a") is first
    assert len({id(first), id(second), id(engines.lease("c"))}) == engines.starts() == 3


def test_callers_of_a_dead_engine_share_those_that_are_left(killed: list[Any]) -> None:
    engines = pool(2)
    first, second = engines.lease("a"), engines.lease("b")
    assert engines.lease("c") is first
    third = engines.lease("a", first)
    assert engines.lease("c", first) in (second, third)
    assert killed == [first]
    assert engines.starts() == 3


def test_stopping_ends_all(killed: list[Any]) -> None:
    engines = pool(2)
    leased = [engines.lease("a"), engines.lease("b")]
    engines.stop()
    assert killed == leased


class Handle:
    """Replaces the handle of a pool's actor: any method can be called, and no engine was started."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: 0)


@pytest.mark.parametrize(("free", "stays"), [(1.0, False), (2.0, True)])
def test_another_kind_leaves_a_cpu_to_the_tasks_that_feed_it(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch, free: float, stays: bool
) -> None:
    """On two CPUs, two engines of one CPU each would make every later task of Ray Data wait for ever."""
    first = Handle()
    spec = EngineSpec(lambda: (Engine(), None), {"kind": 1}, {"CPU": 1.0}, 1)
    monkeypatch.setattr(engine_pool, "_pools", {spec.name: (first, spec)})
    monkeypatch.setattr(engine_pool, "beside_driver", lambda: None)
    stand_in = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: Handle()))
    for name, value in {
        "is_initialized": lambda: True,
        "get": lambda value: value,
        "available_resources": lambda: {"CPU": free},
        "remote": lambda **_: lambda _: stand_in,
    }.items():
        monkeypatch.setattr(engine_pool.ray, name, value)
    pool_of(EngineSpec(lambda: (Engine(), None), {"kind": 2}, {"CPU": 1.0}, 1))
    assert (first not in killed) == stays


def test_stages_share_engines_unless_an_engine_would_be_another(tiny_model: str) -> None:
    base = TeacherConfig(model=tiny_model, device="cpu")
    names = {
        changes: engine_spec(base.model_copy(update=dict([changes]))).name  # type: ignore[union-attr]
        for changes in [("temperature", 0.5), ("top_p", 0.5), ("max_tokens", 9), ("batch_rows", 1)]
    }
    assert set(names.values()) == {engine_spec(base).name}  # type: ignore[union-attr]
    assert engine_spec(base.model_copy(update={"max_model_len": 512})).name not in names.values()  # type: ignore[union-attr]
    assert engine_spec(TeacherConfig(backend="openai", model="m")) is None
