"""Makes the calls that the ledger does not hold: admitted, answered by the teacher, committed batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.calls import WITH_REPLIES
from operators.teacher.config import TeacherConfig, num_prompt_tokens
from operators.teacher.generate import generate
from operators.teacher.supervisor import Supervisor

MOST_WAITING = 8  # tasks that wait for admission; each is a process of its own
BATCHES_IN_FLIGHT = 3  # for each batch that the engines can work on
Metrics = dict[str, int]
Commit = Callable[[pa.Table], None]


class TeacherStoppedError(RuntimeError):
    """No further calls can be made; the message says why and what helps. Everything answered is in the ledger."""


@dataclass
class Asking:
    """The calls of one stage: who answers, how replies are stored, and what may be spent.

    Attributes:
        stage: named in errors.
        commit: stores a table of replies, whole, before anything else sees it.
        pending: the calls that the ledger does not hold; columns calls.CALLS.
        spent: what the ledger held before.
    """

    stage: str
    teacher: TeacherConfig
    budget: BudgetConfig
    commit: Commit
    pending: Dataset
    spent: Tokens
    metrics: Metrics = field(default_factory=lambda: {"failed_calls": 0, "prompt_tokens": 0, "generated_tokens": 0})

    @property
    def engines(self) -> int:
        """How many engines may work at once."""
        replicas = self.teacher.replicas
        return replicas if isinstance(replicas, int) else replicas[1]

    def run(self) -> Metrics:
        """Make all pending calls; returns failed_calls, prompt_tokens and generated_tokens.

        Raises:
            TeacherStoppedError: a limit of the budget is reached, too many calls fail, or the engine dies of anything.
        """
        working = self.teacher.batch_rows * self.teacher.concurrent_batches * self.engines
        actor: Any = ray.remote(num_cpus=0)(Supervisor)
        supervisor = actor.remote(self.budget, self.spent, BATCHES_IN_FLIGHT * working, self.teacher.max_failed_share)
        try:
            return self._run(supervisor)
        except ray.exceptions.RayError:
            if not ray.get(supervisor.closed.remote()):
                raise
        finally:
            closed = ray.get(supervisor.closed.remote())
            ray.kill(supervisor)
            if closed:
                raise TeacherStoppedError(f"{self.stage}: {closed}")
        return self.metrics

    def _run(self, supervisor: Any) -> Metrics:
        admitted = self.pending.repartition(target_num_rows_per_block=self.teacher.batch_rows).map_batches(
            partial(_admit, supervisor=supervisor, teacher=self.teacher, priced=self.budget.is_limited()),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.05,  # it waits more than it works; a waiting task must not keep a reply from being stored
            concurrency=min(MOST_WAITING, 1 + self.engines),
        )
        committed = generate(admitted, self.teacher, supervisor).map_batches(
            partial(_commit, supervisor=supervisor, commit=self.commit),
            batch_size=None,
            batch_format="pyarrow",
            **WITH_REPLIES,
        )
        committed.context.execution_no_progress_timeout_s = self.teacher.no_progress_timeout_s
        try:
            for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow"):
                for name in self.metrics:
                    self.metrics[name] += int(pc.sum(batch[name]).as_py() or 0)
        except ExecutionTimeoutError:
            raise TeacherStoppedError(
                f"{self.stage}: no reply for teacher.no_progress_timeout_s: {self.teacher.no_progress_timeout_s:g} s "
                f"(engine start included); look into the engine's log, or raise it"
            ) from None
        return self.metrics


def _admit(calls: pa.Table, supervisor: Any, teacher: TeacherConfig, priced: bool) -> pa.Table:
    """The calls that may be made, once they may; the rest wait for another run."""
    if not calls.num_rows:
        return calls
    limits = calls["max_tokens"].to_pylist()
    prompts = (
        [num_prompt_tokens(text, teacher) for text in calls["messages"].to_pylist()] if priced else [0] * len(limits)
    )
    most = [Tokens(*pair) for pair in zip(prompts, limits, strict=True)]
    return calls.slice(0, ray.get(supervisor.admit.remote(calls["call_key"].to_pylist(), most)))


def _commit(replies: pa.Table, supervisor: Any, commit: Commit) -> pa.Table:
    """Store the replies, then say so; answers with one row of sums."""
    if replies.num_rows:
        commit(replies)
    errors = [error for error in replies["error"].to_pylist() if error]
    used = Tokens(*(int(pc.sum(replies[name]).as_py() or 0) for name in ("prompt_tokens", "generated_tokens")))
    ray.get(supervisor.settle.remote(replies["call_key"].to_pylist(), used, len(errors), errors[-1] if errors else ""))
    return pa.table(
        {"failed_calls": [len(errors)], "prompt_tokens": [used.prompt], "generated_tokens": [used.generated]}
    )
