"""Compares the student with its base model on rows that neither was trained on: loss, sample answers, judged wins.

Each model is loaded once by a pool of actors of its own, the base model's pool before the student's, so that an actor
never holds two models and the pools never wait for each other's CPUs.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy, Dataset

from operators.columns import RAW
from operators.evaluate.config import NOT_FINITE, EvaluateConfig
from operators.evaluate.judge import Sample, judge_samples, tally
from operators.progress import report_progress
from operators.stage import require_columns
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger


def evaluate(
    held_out: Dataset, config: EvaluateConfig, base: str, student: str, teacher: TeacherConfig, ledger: Ledger
) -> dict[str, Any]:
    """Measure base model and student on the held-out rows.

    The samples are the rows of lowest row id; ids are hashes, so this is a random choice that does not change while
    the rows are there.

    Columns in:
        columns.RAW; `outcome` is not looked at.

    Returns:
        held_out_loss: base, student: nats per response token, noise off, weighted by tokens, None where there is no
        row or a row's loss is not finite; num_tokens, num_rows: that were scored; unscored: rows by reason.
        samples: dicts of row_id, instruction, input, reference, base, student (greedy answers), base_tokens,
        student_tokens, and if judged verdict, scores, unparsed; unanswered: samples whose prompt leaves no room.
        judge: `judge.tally`, or None if nothing was judged.

    Raises:
        ValueError: a column is missing, or base and student do not read the same tokens.
    """
    num_rows = held_out.count()
    if not num_rows:
        return {"held_out_loss": _compare_losses(_Losses(), _Losses()), "samples": [], "unanswered": 0, "judge": None}
    require_columns("evaluate", RAW.names, held_out.columns() or [])
    sample_ids = _lowest_ids(held_out, config.num_samples)
    report_progress("evaluate", total=2 * num_rows)
    base_losses, base_answers = _measure(held_out, base, sample_ids, config)
    student_losses, student_answers = _measure(held_out, student, sample_ids, config)
    samples = _side_by_side(_texts(held_out, sample_ids), base_answers, student_answers)
    result: dict[str, Any] = {
        "held_out_loss": _compare_losses(base_losses, student_losses),
        "samples": samples,
        "unanswered": len(sample_ids) - len(samples),
        "judge": None,
    }
    if config.judge and samples:
        judged = judge_samples(samples, teacher, ledger, config.judge_max_tokens, critique=config.judge_critique)
        result |= {"samples": judged, "judge": tally(judged)}
    return result


@dataclass
class _Losses:
    """Sums over the rows that a model scored."""

    nll: float = 0.0
    num_tokens: int = 0
    num_rows: int = 0
    unscored: Counter[str] = field(default_factory=Counter)

    def mean(self) -> float | None:
        """Nats per token; None where it would hide that there are no rows, or rows without a finite loss."""
        return self.nll / self.num_tokens if self.num_tokens and not self.unscored[NOT_FINITE] else None


def _lowest_ids(held_out: Dataset, num_samples: int) -> list[str]:
    """The `num_samples` lowest row ids; each block sends no more than that many to the driver."""
    lowest = held_out.map_batches(
        partial(_lowest_of_block, count=num_samples), batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    return heapq.nsmallest(num_samples, (row["row_id"] for row in lowest.iter_rows()))


def _lowest_of_block(rows: pa.Table, count: int) -> pa.Table:
    return rows.select(["row_id"]).sort_by("row_id").slice(0, count)


def _texts(held_out: Dataset, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
    wanted = held_out.map_batches(partial(_rows_of, row_ids=list(sample_ids)), batch_format="pyarrow", num_cpus=0.5)
    return sorted(wanted.iter_rows(), key=lambda row: str(row["row_id"]))


def _rows_of(rows: pa.Table, row_ids: list[str]) -> pa.Table:
    texts = rows.select(["row_id", "instruction", "input", "response"])
    return texts.filter(pc.is_in(texts["row_id"], pa.array(row_ids, pa.string())))


def _measure(
    held_out: Dataset, model: str, sample_ids: Sequence[str], config: EvaluateConfig
) -> tuple[_Losses, dict[str, dict[str, Any]]]:
    from operators.evaluate.model_actor import ModelActor  # imports torch, which the driver does without

    measured = held_out.map_batches(
        ModelActor,
        fn_constructor_kwargs={"model": model, "sample_ids": sample_ids, "config": config},
        batch_size=config.batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.actors),
        **config.resources(),
    )
    summaries = measured.map_batches(_summarise, batch_format="pyarrow", num_cpus=0.5)
    losses = _Losses()
    answers: dict[str, dict[str, Any]] = {}
    for summary in summaries.iter_rows():
        _add(losses, json.loads(summary["losses"]))
        answers |= {row["row_id"]: row for row in json.loads(summary["answers"])}
    return losses, answers


def _summarise(measured: pa.Table) -> pa.Table:
    scored = measured.filter(pc.is_valid(measured["nll"]))
    losses = {
        "nll": pc.sum(scored["nll"]).as_py() or 0.0,
        "num_tokens": pc.sum(scored["num_tokens"]).as_py() or 0,
        "num_rows": scored.num_rows,
        "unscored": Counter(measured["unscored"].drop_null().to_pylist()),
    }
    answers = measured.filter(pc.is_valid(measured["answer"])).select(["row_id", "answer", "answer_tokens"])
    return pa.table({"losses": [json.dumps(losses)], "answers": [json.dumps(answers.to_pylist())]})


def _add(losses: _Losses, more: dict[str, Any]) -> None:
    losses.nll += more["nll"]
    losses.num_tokens += more["num_tokens"]
    losses.num_rows += more["num_rows"]
    losses.unscored.update(more["unscored"])


def _compare_losses(base: _Losses, student: _Losses) -> dict[str, Any]:
    both = base.mean() is not None and student.mean() is not None
    if both and base.num_tokens != student.num_tokens:
        raise ValueError(
            f"evaluate: the student reads {student.num_tokens} held-out tokens, its base model {base.num_tokens}; "
            "they must share tokenizer and chat template"
        )
    return {
        "base": base.mean(),
        "student": student.mean(),
        "num_tokens": base.num_tokens,
        "num_rows": base.num_rows,
        "unscored": dict(base.unscored | student.unscored),
    }


def _side_by_side(
    texts: Iterable[dict[str, Any]], base: dict[str, dict[str, Any]], student: dict[str, dict[str, Any]]
) -> list[Sample]:
    return [
        {
            "row_id": row["row_id"],
            "instruction": row["instruction"],
            "input": row["input"],
            "reference": row["response"],
            "base": base[row["row_id"]]["answer"],
            "student": student[row["row_id"]]["answer"],
            "base_tokens": base[row["row_id"]]["answer_tokens"],
            "student_tokens": student[row["row_id"]]["answer_tokens"],
        }
        for row in texts
        if row["row_id"] in base and row["row_id"] in student
    ]
