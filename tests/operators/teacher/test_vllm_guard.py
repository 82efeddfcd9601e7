"""An engine that has started and then says nothing closes the stage, long before the patience of Ray Data ends."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray

from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.supervisor import Supervisor
from operators.teacher.vllm_guard import PROBE_TOKENS, guarded

ROW = {
    "call_key": "a",
    "tokenized_prompt": list(range(20)),
    "sampling_params": {"max_tokens": 64, "temperature": 0.5, "structured_outputs": {"json": "{}"}},
}


class Engine:
    """Stands for Ray's stage: `llm.generate_async` for one row, `udf` for a batch; hangs if it is told to."""

    hangs = False

    def __init__(self) -> None:
        self.llm = self
        self.seen: list[dict[str, Any]] = []

    async def generate_async(self, row: dict[str, Any]) -> str:
        self.seen.append(row)
        if self.hangs:
            await asyncio.Event().wait()
        return "said"

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[str]:
        for row in batch:
            yield await self.llm.generate_async(row)


class HangingEngine(Engine):
    hangs = True


def supervisor() -> Any:
    return ray.remote(num_cpus=0)(Supervisor).remote(BudgetConfig(), Tokens(), 8, 0.5)


async def answers(engine: Any, *batches: list[dict[str, Any]]) -> list[str]:
    return [output for batch in batches for output in [each async for each in engine.udf(batch)]]


@pytest.mark.usefixtures("local_ray")
def test_the_first_call_of_an_engine_is_one_token_of_the_template() -> None:
    watcher = supervisor()
    engine = guarded(Engine, watcher, 5.0)()
    assert asyncio.run(answers(engine, [ROW, {**ROW, "call_key": "b"}], [{**ROW, "call_key": "c"}])) == ["said"] * 3
    probe, *rows = engine.seen
    assert probe["tokenized_prompt"] == list(range(PROBE_TOKENS))
    assert probe["sampling_params"] == {"max_tokens": 1, "temperature": 0.5}
    assert [row["call_key"] for row in rows] == ["a", "b", "c"]
    assert all(row["sampling_params"] == ROW["sampling_params"] for row in rows)


@pytest.mark.usefixtures("local_ray")
def test_an_engine_that_hangs_at_its_first_call_closes_the_stage() -> None:
    watcher = supervisor()
    engine = guarded(HangingEngine, watcher, 0.1)()
    with pytest.raises(RuntimeError, match=r"no token within teacher.first_token_timeout_s: 0.1 s"):
        asyncio.run(answers(engine, [ROW]))
    assert "first_token_timeout_s" in ray.get(watcher.closed.remote())
    assert ray.get(watcher.admit.remote(["b"], [Tokens()])) == 0
