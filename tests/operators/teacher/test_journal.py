"""Replies are stored within seconds, without waiting for the slowest of their batch; refusals are not attempts."""

import asyncio
from typing import Any

import pytest

from operators.teacher.calls import answered, failed
from operators.teacher.failures import FATAL, LOST, REFUSED
from operators.teacher.journal import Journal, Store


def reply(key: str, error: str = "") -> dict[str, Any]:
    call = {"call_key": key, "row_id": key}
    return failed(call, error) if error else answered(call, "said", "stop", 1, 2)


def test_a_reply_is_stored_while_the_slowest_of_its_batch_is_still_to_come() -> None:
    stored: list[list[str]] = []
    slow_may_end = asyncio.Event

    async def story() -> None:
        first_stored, loop = slow_may_end(), asyncio.get_running_loop()

        def keep(replies: list[dict[str, Any]], _: str) -> None:
            stored.append([one["call_key"] for one in replies])
            loop.call_soon_threadsafe(first_stored.set)

        journal = Journal(keep, most_rows=100, most_seconds=0.01)
        await journal.add(reply("quick"))
        await asyncio.wait_for(first_stored.wait(), 20)  # no other reply came, and no batch has ended
        await journal.add(reply("slow"))
        await journal.flush()

    asyncio.run(story())
    assert stored == [["quick"], ["slow"]]


def test_a_full_batch_is_stored_at_once() -> None:
    stored: list[int] = []

    async def story() -> None:
        journal = Journal(lambda replies, _: stored.append(len(replies)), most_rows=3, most_seconds=1000)
        for number in range(7):
            await journal.add(reply(str(number)))
        await journal.flush()

    asyncio.run(story())
    assert stored == [3, 3, 1]


def test_a_full_disk_is_raised_at_the_next_flush_and_loses_nothing() -> None:
    stored: list[str] = []
    full = [True]

    def keep(replies: list[dict[str, Any]], _: str) -> None:
        if full.pop() if full else False:
            raise OSError("no space left")
        stored.extend(one["call_key"] for one in replies)

    async def story() -> None:
        journal = Journal(keep, most_rows=100, most_seconds=1000)
        await journal.add(reply("a"))
        with pytest.raises(OSError, match="no space left"):
            await journal.flush()
        await journal.add(reply("b"))
        await journal.flush()

    asyncio.run(story())
    assert stored == ["a", "b"]


def test_stored_replies_that_were_not_reported_are_written_again_under_the_same_name() -> None:
    tried: list[tuple[list[str], str]] = []

    def keep(replies: list[dict[str, Any]], name: str) -> None:
        tried.append(([one["call_key"] for one in replies], name))
        if len(tried) == 1:
            raise OSError("the supervisor is gone")

    async def story() -> None:
        journal = Journal(keep, most_rows=100, most_seconds=1000)
        await journal.add(reply("a"))
        with pytest.raises(OSError, match="gone"):
            await journal.flush()
        await journal.add(reply("b"))
        await journal.flush()

    asyncio.run(story())
    assert [keys for keys, _ in tried] == [["a"], ["a"], ["b"]]
    assert tried[0][1] == tried[1][1] != tried[2][1]


class Supervisor:
    def __init__(self) -> None:
        self.settle = self
        self.told: list[Any] = []

    def remote(self, *arguments: Any) -> None:
        self.told.append(arguments)


@pytest.mark.parametrize(("error", "files"), [("boom", 1), (f"{FATAL}x", 1), (f"{LOST}x", 0), (f"{REFUSED}x", 0)])
def test_lost_and_refused_calls_do_not_count_as_attempts(
    error: str, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[list[str]] = []

    def commit(table: Any, name: str) -> str:
        committed.append(table["call_key"].to_pylist())
        return f"file {name}"

    monkeypatch.setattr("operators.teacher.journal.ray.get", lambda done: done)
    supervisor = Supervisor()
    Store(commit, supervisor).keep([reply("a"), reply("b", error)], "of a batch")
    assert committed == [["a"], ["b"]][: 1 + files]
    [(told, failures)] = supervisor.told
    assert [one["call_key"] for one in told] == ["a", "b"]
    assert failures == ("file of a batch-failed" if files else "")
