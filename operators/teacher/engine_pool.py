"""Engines that outlive the stage that started them: actors of one model, shared by all stages of a run.

An engine takes minutes to load, so reflection, repair and judge use the same one. The pool is an actor that starts
engines when they are needed, hands out idle ones, and replaces dead ones. It belongs to the process that asked for it
and ends with it; `make_room` ends it earlier if another stage needs the resources of its engines.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from operators.driver_node import beside_driver

STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class EngineSpec:
    """One kind of engine.

    Attributes:
        make: returns a new engine actor, which starts when Ray finds room for it, and its placement group or None.
        identity: everything that makes two engines different, as plain JSON.
        needs: logical resources of one engine.
        most: largest number of engines at once.
    """

    make: Callable[[], tuple[Any, Any]]
    identity: dict[str, Any]
    needs: dict[str, float]
    most: int

    @property
    def name(self) -> str:
        """Of the pool."""
        text = json.dumps(self.identity, sort_keys=True, default=str)
        return f"engines {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class EnginePool:
    """The actor's body; it handles one request at a time, so that two callers never get the same idle engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._groups: dict[Any, Any] = {}  # engine -> its placement group, or None
        self._leases: dict[str, Any] = {}  # caller -> its engine
        self._starts = 0

    def lease(self, caller: str, broken: Any = None) -> Any:
        """An idle engine; else a new one; else, if there are `most`, the engine with the fewest callers.

        Args:
            caller: id of the caller's actor. Ray restarts an actor under the same id, and it has forgotten its engine:
                what it held before is given back.
            broken: the caller's former engine, which has died.
        """
        if broken in self._groups:
            self._remove(broken)
        self._leases.pop(caller, None)
        callers = Counter(self._leases.values())
        engine = next((engine for engine in self._groups if not callers[engine]), None)
        if engine is None and len(self._groups) < self._spec.most:
            engine, group = self._started()
            self._groups[engine] = group
        if engine is None:
            engine = min(self._groups, key=lambda one: callers[one])
        self._leases[caller] = engine
        return engine

    def end_stage(self) -> None:
        """All callers are gone."""
        self._leases.clear()

    def starts(self) -> int:
        """How many engines were started so far."""
        return self._starts

    def stop(self) -> None:
        """End all engines and what they started."""
        stopping = [engine.stop.remote() for engine in self._groups]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        for engine in [*self._groups]:
            self._remove(engine)

    def _started(self) -> tuple[Any, Any]:
        self._starts += 1
        return self._spec.make()

    def _remove(self, engine: Any) -> None:
        self._leases = {caller: held for caller, held in self._leases.items() if held != engine}
        ray.kill(engine)
        group = self._groups.pop(engine)
        if group is not None:
            ray.util.remove_placement_group(group)


_pools: dict[str, tuple[Any, EngineSpec]] = {}  # of this process
_ended = 0  # engine starts of pools that are gone


def pool_of(spec: EngineSpec) -> Any:
    """The pool for this kind of engine: the running one, or a new one; the other pools stop if it needs their room."""
    _forget_lost_pools()
    if spec.name not in _pools:
        whole = {name: count * spec.most for name, count in spec.needs.items()}
        make_room(whole | {"CPU": whole.get("CPU", 0) + 1})
        actor: Any = ray.remote(num_cpus=0)(EnginePool)
        _pools[spec.name] = actor.options(name=spec.name, scheduling_strategy=beside_driver()).remote(spec), spec
    return _pools[spec.name][0]


def make_room(needed: Mapping[str, float]) -> None:
    """Stop all engines unless the cluster has these logical resources, such as {"CPU": 2}, in addition to theirs.

    Ask for one CPU more than the actors take: the tasks that feed them need it, or the actors wait forever.
    """
    _forget_lost_pools()
    free: dict[str, float] = ray.available_resources() if _pools else {}  # type: ignore[no-untyped-call]
    if any(count > free.get(name, 0) for name, count in needed.items()):
        stop_engines()


def stop_engines() -> None:
    """Stop all engines of this process."""
    global _ended
    for pool, _ in _pools.values():
        _ended += ray.get(pool.starts.remote())
        ray.get(pool.stop.remote())
        ray.kill(pool)
    _pools.clear()


@contextmanager
def stopping_engines() -> Iterator[None]:
    """Stop the engines at the end, also after an error."""
    try:
        yield
    finally:
        stop_engines()


def engine_starts() -> int:
    """How many engines this process has started."""
    _forget_lost_pools()
    return _ended + sum(int(ray.get(pool.starts.remote())) for pool, _ in _pools.values())


def _forget_lost_pools() -> None:
    """Forget pools that died with a cluster to which this process was connected before."""
    if not ray.is_initialized():
        _pools.clear()
    for name, (pool, _) in list(_pools.items()):
        try:
            ray.get(pool.starts.remote())
        except ray.exceptions.RayError:
            del _pools[name]
        except Exception:  # noqa: BLE001 - Ray raises plain errors for handles of a cluster that is gone
            del _pools[name]
