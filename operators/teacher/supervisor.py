"""Watches over the calls of one stage: how many are in flight, what may still be spent, if the teacher still answers.

One small actor a stage. Calls ask to be admitted before they reach the engine and are settled once their reply is on
disk: what is admitted and not settled is in flight, all that a crash can lose.

An engine that dies is replaced by Ray, which hands it the same batch again, for ever. So engines say what they begin: a
batch that comes back is taken one call at a time, and a call that twice killed an engine in its turn is not begun
again (once may be the fault of another batch on that engine). One such call costs three engine starts, once, and the
other engines work on.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

from operators.teacher.budget import BudgetConfig, Tokens

JUDGED_AFTER = 20  # calls; before that, a share of failures says nothing
DEADLY_AFTER = 2  # deaths of an engine in the turn of one call
MAX_KILLERS = 2  # different calls of a batch, before any call survived
MAX_DEADLY = 3  # different calls while no other survives; with more, the engine is to blame
FATAL = "fatal: the engine died of this call"  # in the error of a call that is never made again


@dataclass(frozen=True)
class Start:
    """How an engine is to take a batch.

    Attributes:
        one_by_one: the batch has killed an engine before.
        deadly: keys of calls that are known to kill; not to be begun.
        closed: why no call is to be begun at all; "" if they may.
    """

    one_by_one: bool
    deadly: frozenset[str]
    closed: str


class Supervisor:
    """The actor's body; `admit` waits, so the methods are coroutines."""

    def __init__(self, budget: BudgetConfig, spent: Tokens, max_in_flight: int, max_failed_share: float) -> None:
        """Start to watch.

        Args:
            budget: the limits.
            spent: what the ledger held before this stage.
            max_in_flight: calls that may be admitted and not settled.
            max_failed_share: of the settled calls; if more have failed, no further call is admitted.
        """
        self._budget, self._spent = budget, spent
        self._max_in_flight, self._max_failed_share = max_in_flight, max_failed_share
        self._in_flight: dict[str, Tokens] = {}
        self._reserved = Tokens()  # what the calls in flight cost at most
        self._begun: Counter[str] = Counter()  # batches, by the key of their first call
        self._turns: Counter[str] = Counter()  # how often a call had its turn alone and did not come back
        self._deadly: set[str] = set()
        self._deadly_in_a_row = 0
        self._any_survived = False
        self._settled = self._failed = 0
        self._last_error = ""
        self._closed = ""
        self._changed = asyncio.Condition()

    async def admit(self, keys: list[str], most: list[Tokens]) -> int:
        """Wait until these calls may be made; returns how many of them, from the first, may be.

        Args:
            keys: of the calls; admitting a key again replaces it, so a task that is retried counts once.
            most: what each call costs at most: its prompt and the longest reply.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or not self._in_flight or self._fits(keys, most))
            if self._closed:
                return 0
            count = len(keys)
            while count and not self._affordable(most[:count]):
                count -= 1
            if count < len(keys):
                self._closed = self._over_budget(most[: count + 1])
            for key, tokens in zip(keys[:count], most[:count], strict=True):
                self._release(key)
                self._in_flight[key] = tokens
                self._reserved += tokens
            return count

    async def settle(self, keys: list[str], used: Tokens, failed: int, error: str) -> None:
        """These calls are on disk; `failed` of them have no reply, `error` says why the last of those has none."""
        async with self._changed:
            for key in keys:
                self._release(key)
                self._begun.pop(key, None)
                self._turns.pop(key, None)
            if len(keys) > failed:
                self._note_survival()
            self._spent += used
            self._settled += len(keys)
            self._failed += failed
            self._last_error = error or self._last_error
            if self._settled >= JUDGED_AFTER and self._failed > self._max_failed_share * self._settled:
                self._closed = self._closed or (
                    f"{self._failed} of {self._settled} calls failed, more than teacher.max_failed_share: "
                    f"{self._max_failed_share:g}; the last with {self._last_error!r}; see to the teacher and run again"
                )
            self._changed.notify_all()

    async def begin(self, keys: list[str]) -> Start:
        """An engine is about to begin a batch."""
        self._begun[keys[0]] += 1
        deadly = frozenset(key for key in keys if self._turns[key] >= DEADLY_AFTER)
        self._deadly_in_a_row += len(deadly - self._deadly)
        self._deadly |= deadly
        killers = sum(self._turns[key] > 0 for key in keys)
        none_survives = killers == MAX_KILLERS or len(deadly) == len(keys)
        if (none_survives and not self._any_survived) or self._deadly_in_a_row > MAX_DEADLY:
            self._closed = self._closed or "the engine dies of every call; look into its log and at its memory"
        return Start(self._begun[keys[0]] > 1, deadly, self._closed)

    async def begin_turn(self, key: str) -> None:
        """An engine is about to begin this call and no other of its batch."""
        self._turns[key] += 1

    async def end_turn(self, key: str) -> None:
        """The call did not kill the engine."""
        self._turns.pop(key, None)
        self._note_survival()

    async def close(self, reason: str) -> None:
        """Admit no further call, for this reason unless there is one before it."""
        async with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    async def closed(self) -> str:
        """Why no further call is admitted, for the user to read; "" while calls are."""
        return self._closed

    def _fits(self, keys: list[str], most: list[Tokens]) -> bool:
        return len(self._in_flight) + len(keys) <= self._max_in_flight and self._affordable(most)

    def _affordable(self, most: list[Tokens]) -> bool:
        return not self._budget.exceeded_by(self._with(most))

    def _with(self, most: list[Tokens]) -> Tokens:
        return sum(most, self._spent + self._reserved)

    def _note_survival(self) -> None:
        self._deadly_in_a_row, self._any_survived = 0, True

    def _release(self, key: str) -> None:
        self._reserved -= self._in_flight.pop(key, Tokens())

    def _over_budget(self, most: list[Tokens]) -> str:
        return (
            f"{self._budget.exceeded_by(self._with(most))} is reached ({self._spent.prompt} prompt and "
            f"{self._spent.generated} generated tokens spent); raise it and run again, what is paid for is kept"
        )
