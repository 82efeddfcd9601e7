"""Supervises the calls of one stage: how many are in flight, what may still be spent, whether the teacher answers.

Each stage has one such small actor. A call is admitted before it is sent to the teacher, and settled once its reply is
on disk. Calls that are admitted and not settled are in flight; a crash can lose no others. Callers report the death of
an engine; see `deaths`.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.calls import Reply
from operators.teacher.deaths import Deaths, Verdict
from operators.teacher.failures import is_teachers_fault, refusal, stage_failure
from operators.teacher.settled import SettledKeys

JUDGED_AFTER = 20  # calls that come back before the share of failures is checked; at its end every stage is checked
# In addition, this share of the number of calls that earlier runs answered must come back before that check: the first
# calls of a repeated run may all be rows that fail in every run although the teacher works.
JUDGED_SHARE = 0.1
MOST_KINDS = 5  # kinds of errors that are reported, the most frequent
KIND_CHARS = 160  # errors with the same first characters are of the same kind


@dataclass(frozen=True)
class Totals:
    """The counts of a stage's settled calls.

    Attributes:
        settled: calls that came back.
        failed: those of them without a reply.
        used: their tokens.
        errors: text of an error and how many calls failed with it, the most frequent first.
        engine_deaths: engines that died with calls on them.
    """

    settled: int
    failed: int
    used: Tokens
    errors: tuple[tuple[str, int], ...]
    engine_deaths: int


class Supervisor:
    """The actor's body; `admit` waits, so the methods are coroutines."""

    def __init__(
        self,
        budget: BudgetConfig,
        spent: Tokens,
        max_in_flight: int,
        max_failed_share: float,
        answered_before: int = 0,
    ) -> None:
        """Start with no call in flight.

        Args:
            budget: the limits.
            spent: tokens of the calls that the ledger held before this stage.
            max_in_flight: largest number of calls that are admitted and not settled.
            max_failed_share: of the settled calls; if more have failed, no further call is admitted.
            answered_before: calls of this stage that earlier runs settled; they count in the share of failures.
        """
        self._budget, self._spent, self._before = budget, spent, spent
        self._max_in_flight, self._max_failed_share = max_in_flight, max_failed_share
        self._in_flight: dict[str, Tokens] = {}
        self._reserved = Tokens()  # the largest cost of the calls in flight
        self._answered_before = answered_before
        self._settled_keys = SettledKeys()
        self._deaths = Deaths()
        self._settled = self._failed = self._teachers_fault = 0
        self._errors: Counter[str] = Counter()
        self._last_error = ""
        self._closed = ""
        self._failures_files: list[str] = []
        self._changed = asyncio.Condition()

    async def admit(self, keys: list[str], most: list[Tokens]) -> int:
        """Wait until these calls may be made; returns how many of them, counted from the first, may be.

        Calls that were admitted and lost with their node are admitted again. Those of them that were settled before
        stay settled and need no budget (`open_calls`).

        Args:
            keys: of the calls; admitting a key again replaces it, so a retried task counts once.
            most: the largest cost of each call: its prompt and the longest reply.
        """
        most = [Tokens() if key in self._settled_keys else tokens for key, tokens in zip(keys, most, strict=True)]
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._fits(keys, most))
            if self._closed:
                return 0
            for key in keys:
                self._release(key)
            count = len(keys)
            while count and not self._affordable(most[:count]):
                count -= 1
            if count < len(keys):
                self._closed = self._over_budget(most[: count + 1])
            for key, tokens in zip(keys[:count], most[:count], strict=True):
                if key not in self._settled_keys:
                    self._in_flight[key] = tokens
                    self._reserved += tokens
            return count

    async def open_calls(self, keys: list[str]) -> list[str]:
        """Those of these calls that are admitted and not settled; an actor asks this before it makes a batch."""
        return [key for key in keys if key in self._in_flight]

    async def settle(self, replies: list[Reply], failures_file: str = "") -> None:
        """Count these calls as settled: they have come back, and their replies are on disk.

        Args:
            replies: call_key, prompt_tokens, generated_tokens and error of each.
            failures_file: the file with the failed ones; "" if none failed.
        """
        async with self._changed:
            self._failures_files += [failures_file] if failures_file else []
            for reply in replies:
                if reply["call_key"] in self._in_flight:
                    self._release(reply["call_key"])
                    self._settled_keys.add(reply["call_key"])
                    self._count(reply)
            self._closed = self._closed or refusal(reply["error"] for reply in replies)
            if self._settled >= max(JUDGED_AFTER, JUDGED_SHARE * self._answered_before):
                self._closed = self._closed or self._judged(self._settled)
            self._changed.notify_all()

    async def died(self, keys: list[str], survived: bool) -> Verdict:
        """An engine died with these calls on it; returns how to continue.

        Args:
            keys: of the calls.
            survived: whether any call was answered since the last death.
        """
        if survived:
            self._deaths.survived()
        verdict = self._deaths.died(keys)
        if verdict.closed:
            await self.close(verdict.closed)
        return verdict

    async def close(self, reason: str) -> None:
        """Admit no further call; an earlier reason is kept."""
        async with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    async def closed(self) -> str:
        """Why no further call is admitted, for the user; "" as long as calls are admitted."""
        return self._closed

    async def conclude(self) -> str:
        """To be called after the last call: why the stage cannot count as done; "" if it can."""
        return self._closed or self._judged(self._settled + self._answered_before)

    async def discounted_files(self) -> list[str]:
        """The files of failed calls that do not count as attempts of their rows, because the teacher failed."""
        return self._failures_files if self._judged(self._settled + self._answered_before) else []

    async def totals(self) -> Totals:
        """The counts of the settled calls."""
        used = self._spent - self._before
        return Totals(
            self._settled, self._failed, used, tuple(self._errors.most_common(MOST_KINDS)), self._deaths.count
        )

    def _count(self, reply: Reply) -> None:
        self._spent += Tokens(reply["prompt_tokens"], reply["generated_tokens"])
        self._settled += 1
        if not reply["error"]:
            self._deaths.survived()
            return
        self._failed += 1
        self._errors[reply["error"][:KIND_CHARS]] += 1
        if len(self._errors) > 10 * MOST_KINDS:
            self._errors = Counter(dict(self._errors.most_common(MOST_KINDS)))
        if is_teachers_fault(reply["error"]):
            self._teachers_fault += 1
            self._last_error = reply["error"]

    def _judged(self, among: int) -> str:
        return stage_failure(self._teachers_fault, among, self._max_failed_share, self._last_error)

    def _fits(self, keys: list[str], most: list[Tokens]) -> bool:
        """Whether there is room for these calls, or no other call is in flight whose end could make room."""
        own = [self._in_flight[key] for key in keys if key in self._in_flight]  # the task was retried
        others = len(self._in_flight) - len(own)
        affordable = not self._budget.exceeded_by(self._with(most) - sum(own, Tokens()))
        return not others or (others + len(keys) <= self._max_in_flight and affordable)

    def _affordable(self, most: list[Tokens]) -> bool:
        return not self._budget.exceeded_by(self._with(most))

    def _with(self, most: list[Tokens]) -> Tokens:
        return sum(most, self._spent + self._reserved)

    def _release(self, key: str) -> None:
        self._reserved -= self._in_flight.pop(key, Tokens())

    def _over_budget(self, most: list[Tokens]) -> str:
        next_call = most[-1].prompt + most[-1].generated
        return (
            f"{self._budget.exceeded_by(self._with(most))} is reached ({self._spent.prompt} prompt and "
            f"{self._spent.generated} generated tokens spent; the next call may take {next_call}); raise it and run "
            "again, all replies are kept"
        )
