"""Stores replies on disk within seconds after they came, without waiting for the slowest reply of a batch."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from operators.teacher.calls import Reply, replies_table
from operators.teacher.failures import is_attempt

Commit = Callable[[pa.Table, str], str]  # stores replies under a name, once even if called twice; returns the path

_TOLD = ("call_key", "prompt_tokens", "generated_tokens", "error")


@dataclass(frozen=True)
class Store:
    """Stores replies on disk, then reports them to the supervisor, which counts them as settled."""

    commit: Commit
    supervisor: Any

    def keep(self, replies: list[Reply], name: str) -> None:
        """Store the replies and the failed attempts, each as a whole file, then report them; blocks until done.

        Args:
            replies: of calls.
            name: must be the same if storing the same replies is retried, so that none is stored twice.
        """
        answered = [reply for reply in replies if not reply["error"]]
        attempts = [reply for reply in replies if reply["error"] and is_attempt(reply["error"])]
        if answered:
            self.commit(replies_table(answered), name)
        file = self.commit(replies_table(attempts), f"{name}-failed") if attempts else ""
        told = [{name: reply[name] for name in _TOLD} for reply in replies]
        ray.get(self.supervisor.settle.remote(told, file))


class Journal:
    """Collects the replies of one asynchronous actor and stores them after a while."""

    def __init__(self, keep: Callable[[list[Reply], str], None], most_rows: int, most_seconds: float) -> None:
        """Start empty.

        Args:
            keep: stores replies under a name; it blocks, so it runs in a thread.
            most_rows: replies are stored as soon as this many are waiting.
            most_seconds: longest time that a reply waits.
        """
        self._keep, self._most_rows, self._most_seconds = keep, most_rows, most_seconds
        self._waiting: list[Reply] = []
        self._unkept: list[tuple[list[Reply], str]] = []  # batches that could not be stored or reported
        self._timer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def add(self, reply: Reply) -> None:
        """Take a reply; returns at once, or when a full batch is stored."""
        self._waiting.append(reply)
        if len(self._waiting) >= self._most_rows:
            await self.flush()
        elif self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._flush_later())

    async def flush(self) -> None:
        """Return when everything that was added before is stored."""
        async with self._writing:
            if self._waiting:
                self._unkept.append((self._waiting, uuid.uuid4().hex))
                self._waiting = []
            while self._unkept:  # an error is raised in the batch that flushes, and the next flush tries again
                await asyncio.to_thread(self._keep, *self._unkept[0])
                del self._unkept[0]

    async def _flush_later(self) -> None:
        await asyncio.sleep(self._most_seconds)
        await self.flush()
