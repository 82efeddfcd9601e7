"""The supervisor, called directly: which calls are admitted, what is spent, and when a stage is stopped or fails."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.failures import FATAL, LOST, REFUSED
from operators.teacher.supervisor import JUDGED_AFTER, Supervisor

NO_LIMIT = BudgetConfig()


def reply(key: str, error: str = "", tokens: int = 10) -> dict[str, Any]:
    return {"call_key": key, "prompt_tokens": tokens, "generated_tokens": tokens, "error": error}


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def run(*steps: Coroutine[Any, Any, Any]) -> list[Any]:
    async def all_steps() -> list[Any]:
        return [await step for step in steps]

    return asyncio.run(asyncio.wait_for(all_steps(), 20))


def supervised(errors: list[str], max_failed_share: float = 0.5, answered_before: int = 0) -> Supervisor:
    """A supervisor that has got a result for each of these errors."""
    watcher = Supervisor(NO_LIMIT, Tokens(), 10_000, max_failed_share, answered_before)
    keys = names(len(errors))
    settled = [reply(key, error) for key, error in zip(keys, errors, strict=True)]
    run(watcher.admit(keys, [Tokens()] * len(keys)), watcher.settle(settled, "file"))
    return watcher


@pytest.mark.parametrize(
    ("errors", "before", "done"),
    [
        (["boom"] * 12, 0, False),  # a stage below JUDGED_AFTER is judged at its end
        (["boom"], 0, False),
        (["boom", ""], 0, True),
        (["boom", "boom", ""], 0, False),
        (["boom"], 50, True),  # a row that fails again, in a stage that mostly succeeds
        ([f"{FATAL}too long"] * 12, 0, True),  # the calls' own fault
        ([f"{LOST}reset"] * 12, 0, False),
        ([""] * 12, 0, True),
    ],
)
def test_a_stage_is_judged_at_its_end(errors: list[str], before: int, done: bool) -> None:
    watcher = supervised(errors, answered_before=before)
    [reason, files] = run(watcher.conclude(), watcher.discounted_files())
    assert (reason == "") is done
    if not done:
        failed = sum(bool(error) for error in errors)
        assert f"{failed} of {len(errors)} calls failed" in reason
        assert errors[0] in reason
        assert files == ["file"]
    else:
        assert files == []


def test_many_failures_stop_a_stage_before_its_end() -> None:
    few, many = supervised(["boom"] * (JUDGED_AFTER - 1)), supervised(["boom"] * JUDGED_AFTER)
    assert run(few.closed()) == [""]
    assert "calls failed" in run(many.closed())[0]
    assert run(many.admit(["next"], [Tokens()])) == [0]


def test_a_refusal_stops_a_stage_at_the_first_call() -> None:
    watcher = supervised([f"{REFUSED}AuthenticationError: 401"])
    [reason] = run(watcher.closed())
    assert "AuthenticationError: 401" in reason
    assert "teacher.api_key_env" in reason


def test_what_is_settled_twice_counts_once() -> None:
    watcher = supervised([""])
    [_, totals] = run(watcher.settle([reply("0")]), watcher.totals())
    assert (totals.settled, totals.used) == (1, Tokens(10, 10))


def test_an_actor_that_was_replaced_learns_what_is_still_open() -> None:
    watcher = supervised(["", ""])
    assert run(watcher.admit(["7", "8"], [Tokens()] * 2), watcher.open_calls(["0", "7", "8"])) == [2, ["7", "8"]]


def test_the_words_of_failures_are_counted() -> None:
    [totals] = run(supervised(["boom", "bang", "boom", ""]).totals())
    assert (totals.settled, totals.failed) == (4, 3)
    assert totals.errors == (("boom", 2), ("bang", 1))


def test_no_more_is_admitted_than_the_budget_can_pay_whatever_the_replies_cost() -> None:
    watcher = Supervisor(BudgetConfig(max_tokens=100), Tokens(), 100, 0.5)
    [count, reason] = run(watcher.admit(names(5), [Tokens(10, 20)] * 5), watcher.closed())
    assert count == 3
    assert "budget.max_tokens: 100 is reached" in reason
    assert "the next call may take 30" in reason


def test_calls_wait_until_others_are_settled_and_not_for_ever() -> None:
    async def story() -> list[int]:
        watcher = Supervisor(BudgetConfig(max_tokens=100), Tokens(), 100, 0.5)
        first = await watcher.admit(["a", "b", "c"], [Tokens(10, 20)] * 3)
        waiting = asyncio.create_task(watcher.admit(["d", "e"], [Tokens(10, 20)] * 2))
        await asyncio.sleep(0)
        assert not waiting.done()
        await watcher.settle([reply(key, tokens=5) for key in ("a", "b", "c")])
        return [first, await waiting]

    assert asyncio.run(asyncio.wait_for(story(), 20)) == [3, 2]


def test_the_crashes_of_an_engine_close_the_stage() -> None:
    watcher = Supervisor(NO_LIMIT, Tokens(), 100, 0.5)
    [first] = run(watcher.died(names(8), False))
    run(watcher.died(list(first.groups[0]), False), watcher.died(list(first.groups[1]), False))
    assert "crashes on every call" in run(watcher.closed())[0]


def test_a_task_that_is_retried_does_not_wait_for_the_calls_that_it_lost() -> None:
    watcher = Supervisor(BudgetConfig(max_tokens=100), Tokens(), 4, 0.5)
    calls = names(3), [Tokens(10, 20)] * 3
    assert run(watcher.admit(*calls), watcher.admit(*calls), watcher.closed()) == [3, 3, ""]
    [_, totals] = run(watcher.settle([reply(key) for key in names(3)]), watcher.totals())
    assert totals.settled == 3


def test_calls_that_have_come_back_are_not_made_again_when_a_node_that_held_them_is_lost() -> None:
    keys, most = names(4), [Tokens(10, 20)] * 4
    watcher = Supervisor(BudgetConfig(max_tokens=150), Tokens(), 10, 0.5)
    first = (watcher.admit(keys, most), watcher.settle([reply(key) for key in keys[:2]]))
    # Ray makes the block of admitted calls again from its lineage, so the same task asks for the same calls.
    again = (watcher.admit(keys, most), watcher.open_calls(keys), watcher.closed())
    assert run(*first, *again)[2:] == [4, keys[2:], ""]
    run(watcher.settle([reply(key) for key in keys]))
    [totals, still_open] = run(watcher.totals(), watcher.open_calls(keys))
    assert (totals.settled, totals.used, still_open) == (4, Tokens(40, 40), [])
