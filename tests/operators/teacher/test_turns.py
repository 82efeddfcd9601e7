"""The calls of an engine that dies go on in groups, each with the next engine to itself, and each call gets a reply."""

import asyncio
from typing import Any

import pytest

from operators.teacher.calls import Call, Reply, answered
from operators.teacher.deaths import Deaths, Verdict
from operators.teacher.failures import CRASHED
from operators.teacher.turns import EngineDiedError, StageClosedError, Turns


class Engine:
    """An engine that dies with all its calls if one of them is deadly, and otherwise answers all of them."""

    def __init__(self, deadly: set[str], deaths_at_random: int = 0) -> None:
        self.deadly, self.deaths_at_random = deadly, deaths_at_random
        self.held: list[str] = []
        self.together: list[set[str]] = []  # the calls on the engine in each round
        self.round: asyncio.Future[bool] | None = None

    async def answer(self, call: Call) -> Reply:
        if self.round is None:
            self.round = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.01, self.end_round)
        this = self.round
        self.held.append(call["call_key"])
        if await this:
            raise EngineDiedError
        return answered(call, "said", "stop", 1, 1)

    def end_round(self) -> None:
        assert self.round is not None
        dies = bool(self.deadly & set(self.held)) or self.deaths_at_random > 0
        self.deaths_at_random -= 1
        self.together.append(set(self.held))
        self.held, ending, self.round = [], self.round, None
        ending.set_result(dies)


def ask(engine: Engine, count: int) -> tuple[dict[str, Reply], Deaths]:
    deaths = Deaths()

    async def judge(keys: list[str], survived: bool) -> Verdict:
        if survived:
            deaths.survived()
        return deaths.died(keys)

    async def everyone() -> list[Reply]:
        turns = Turns(engine.answer, judge)
        calls: list[dict[str, Any]] = [{"call_key": f"call {n}", "row_id": str(n)} for n in range(count)]
        return await asyncio.gather(*(turns.reply(call) for call in calls))

    replies = asyncio.run(asyncio.wait_for(everyone(), 60))
    return {reply["call_key"]: reply for reply in replies}, deaths


def test_without_a_death_all_calls_are_on_the_engine_together() -> None:
    engine = Engine(set())
    replies, _ = ask(engine, 20)
    assert all(reply["reply"] == "said" for reply in replies.values())
    assert [len(held) for held in engine.together] == [20]


def test_after_a_chance_death_each_call_is_answered_and_quarters_run_alone() -> None:
    engine = Engine(set(), deaths_at_random=1)
    replies, deaths = ask(engine, 20)
    assert all(reply["reply"] == "said" for reply in replies.values())
    assert [len(held) for held in engine.together] == [20, 5, 5, 5, 5]
    assert deaths.count == 1


def test_a_deadly_call_fails_and_its_neighbours_are_answered() -> None:
    engine = Engine({"call 7"})
    replies, deaths = ask(engine, 64)
    assert [key for key, reply in replies.items() if reply["error"]] == ["call 7"]
    assert replies["call 7"]["error"] == CRASHED
    assert deaths.count <= 6


def test_an_engine_that_always_dies_closes_the_stage() -> None:
    with pytest.raises(StageClosedError, match="crashes on every call"):
        ask(Engine({f"call {n}" for n in range(10)}), 10)
