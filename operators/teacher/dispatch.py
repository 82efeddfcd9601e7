"""Makes the calls that the ledger does not hold: admits them, lets the teacher answer, stores replies as they come."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from operators.driver_node import beside_driver
from operators.parquet_log import write_whole
from operators.progress import report_progress
from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import pool_of
from operators.teacher.generate import engine_spec, generate
from operators.teacher.journal import Commit, Store
from operators.teacher.prompt_tokens import num_prompt_tokens
from operators.teacher.supervisor import Supervisor, Totals

MOST_WAITING = 8  # tasks that wait for admission; each is a process
BATCHES_IN_FLIGHT = 3  # for each batch that the engines can work on


class TeacherStoppedError(RuntimeError):
    """No further calls can be made; the message gives reason and cure. All replies so far are in the ledger."""


@dataclass
class Asking:
    """The calls of one stage: who answers, how replies are stored, and what may be spent.

    Attributes:
        stage: named in errors.
        teacher: who answers.
        budget: limits of tokens and cost.
        commit: stores a table of replies, whole, before anything else uses it.
        pending: the calls that the ledger does not hold; columns calls.CALLS.
        spent: tokens of the calls that the ledger already holds.
        answered_before: number of this stage's calls that the ledger already holds.
        discount: called with files of failed calls that are the teacher's fault, and do not count as attempts.
        prompts: folder that keeps the prompts by the key of the call; "" keeps none.
    """

    stage: str
    teacher: TeacherConfig
    budget: BudgetConfig
    commit: Commit
    pending: Dataset
    spent: Tokens
    answered_before: int = 0
    discount: Callable[[list[str]], None] | None = None
    prompts: str = ""

    @property
    def engines(self) -> int:
        """Largest number of engines that work at once."""
        replicas = self.teacher.replicas
        return replicas if isinstance(replicas, int) else replicas[1]

    def run(self) -> Totals:
        """Make all pending calls.

        Raises:
            TeacherStoppedError: a limit of the budget is reached, too many calls failed (checked while the stage runs,
                and at its end even for few calls), the teacher refuses all calls, or its engine crashes on all.
        """
        working = self.teacher.batch_rows * self.teacher.concurrent_batches * self.engines
        actor: Any = ray.remote(num_cpus=0)(Supervisor)
        supervisor = actor.options(scheduling_strategy=beside_driver()).remote(
            self.budget,
            self.spent,
            BATCHES_IN_FLIGHT * working,
            self.teacher.max_failed_share,
            self.answered_before,
        )
        try:
            self._make_calls(supervisor)
        except ray.exceptions.RayError:
            if not ray.get(supervisor.closed.remote()):
                raise
        finally:
            closed = ray.get(supervisor.conclude.remote())
            totals: Totals = ray.get(supervisor.totals.remote())
            if self.discount is not None:
                self.discount(ray.get(supervisor.discounted_files.remote()))
            ray.kill(supervisor)
            self._free_engines()
            report_progress(self.stage, note=failures_note(totals))
            if closed:
                raise TeacherStoppedError(f"{self.stage}: {closed}")
        return totals

    def _make_calls(self, supervisor: Any) -> None:
        admitted = self.pending.repartition(target_num_rows_per_block=self.teacher.batch_rows).map_batches(
            partial(
                _admit,
                supervisor=supervisor,
                teacher=self.teacher,
                priced=self.budget.is_limited(),
                kept_in=self.prompts,
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,  # it mostly waits, and must not block the tasks that prepare calls
            concurrency=min(MOST_WAITING, 1 + self.engines),
        )
        replies = generate(admitted, self.teacher, Store(self.commit, supervisor))
        replies.context.execution_no_progress_timeout_s = self.teacher.no_progress_timeout_s
        try:
            for _ in replies.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass  # the replies are on disk, and the supervisor has counted them
        except ExecutionTimeoutError:
            raise TeacherStoppedError(
                f"{self.stage}: no reply for teacher.no_progress_timeout_s: {self.teacher.no_progress_timeout_s:g} s "
                f"(engine start included); look into the engine's log, or raise it"
            ) from None

    def _free_engines(self) -> None:
        spec = engine_spec(self.teacher)
        if spec is not None:
            ray.get(pool_of(spec).end_stage.remote())


def failures_note(totals: Totals) -> str:
    """One line: how many calls failed, and with which errors; "" if none failed."""
    if not totals.failed:
        return ""
    kinds = "; ".join(f"{count} x {words}" for words, count in totals.errors)
    return f"{totals.failed} of {totals.settled} calls failed: {kinds}"


def _admit(calls: pa.Table, supervisor: Any, teacher: TeacherConfig, priced: bool, kept_in: str) -> pa.Table:
    """Wait for admission, and return the calls that may be made; the others are left for another run.

    If `kept_in` is a folder, the prompts of these calls are stored there.
    """
    if not calls.num_rows:
        return calls
    limits = calls["max_tokens"].to_pylist()
    prompts = (
        [num_prompt_tokens(text, teacher) for text in calls["messages"].to_pylist()] if priced else [0] * len(limits)
    )
    most = [Tokens(*pair) for pair in zip(prompts, limits, strict=True)]
    admitted = calls.slice(0, ray.get(supervisor.admit.remote(calls["call_key"].to_pylist(), most)))
    if kept_in and admitted.num_rows:
        write_whole(kept_in, admitted.select(["call_key", "messages"]))
    return admitted
