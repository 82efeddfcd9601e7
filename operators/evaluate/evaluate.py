"""Compares the student with its base model on rows that neither was trained on: loss, sample answers, judged wins.

A pool of actors loads the base model, and after it another pool loads the student, so that an actor never holds two
models and the pools never wait for each other's CPUs. An earlier student is not measured again: the measurements of
every row when it was new are kept (`Models.rows`), and compared on the rows that both have.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, Dataset

from operators.evaluate.config import EvaluateConfig, TrainedAttention
from operators.evaluate.harness import measure_tasks
from operators.evaluate.judge import judge_samples, tally, verdicts
from operators.evaluate.results import RELEASED, Comparison, Evaluation, Harness, Sample
from operators.evaluate.rows import (
    ROWS,
    answers_of,
    change_on_common_rows,
    comparable,
    compare_losses,
    join_measurements,
    read_rows,
    write_rows,
)
from operators.progress import report_progress
from operators.stage import require_columns
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger

TEXTS = ("row_id", "instruction", "input", "response", "turns_before", "turns_after")


@dataclass(frozen=True)
class Rival:
    """An earlier student: its version, its role ("released" or "best"), and the file with its measured rows.

    `folder` has its weights; "" if they are gone or nobody needs them. `attention` is the one it was trained with.
    """

    version: str
    role: str
    rows: str
    folder: str = ""
    attention: TrainedAttention = field(default_factory=TrainedAttention)


@dataclass(frozen=True)
class Models:
    """The models to compare.

    Attributes:
        base: folder or hub id of the model from which the student was trained.
        student: folder of the student.
        rows: path or URI of the Parquet file that keeps the measurements of every row.
        attention: with which the student was trained.
        rivals: earlier students.
        tasks: folder that keeps the scores of models on tasks; path or URI.
        chat_template: text that replaces the base model's own template; "" keeps it. Students have it in their folder.
    """

    base: str
    student: str
    rows: str
    attention: TrainedAttention = field(default_factory=TrainedAttention)
    rivals: Sequence[Rival] = ()
    tasks: str = ""
    chat_template: str = ""


def evaluate(
    held_out: Dataset,
    config: EvaluateConfig,
    models: Models,
    teacher: TeacherConfig,
    ledger: Ledger,
    special_tokens: frozenset[str] = frozenset(),
) -> Evaluation:
    """Measure base model and student on the held-out rows, and compare the student with earlier ones.

    The samples are the rows of lowest row id; ids are hashes, so this is a random choice that stays the same as long
    as the rows exist. Losses are nats per trained token of the whole dialogue (`loss_on`), without noise, weighted by
    tokens. Samples answer the row's instruction. `special_tokens` are the teacher's: they are broken up in texts for
    the judge.

    Columns in:
        columns.RAW; `outcome` is not read.

    Raises:
        ValueError: a column is missing, or base and student tokenise a response differently.
    """
    num_rows = held_out.count()
    if not num_rows:
        return Evaluation(attention=models.attention.name, harness=_on_tasks(models, config))
    require_columns("evaluate", TEXTS, held_out.columns() or [])
    sample_ids = _lowest_ids(held_out, config.num_samples)
    report_progress("evaluate", total=2 * num_rows)
    base = _measure(held_out, models.base, sample_ids, config, TrainedAttention(), models.chat_template)
    student = _measure(held_out, models.student, sample_ids, config, models.attention)
    rows = join_measurements(base, student)
    write_rows(rows, models.rows, config)
    samples = _side_by_side(_texts(held_out, sample_ids), rows)
    unanswered = len(sample_ids) - len(samples)
    judged = partial(
        judge_samples,
        teacher=teacher,
        ledger=ledger,
        max_tokens=config.judge_max_tokens,
        critique=config.judge_critique,
        special_tokens=special_tokens,
        own=config.judge_prompt,
    )
    if config.judge and samples:
        samples = judged(samples)
    return Evaluation(
        held_out_loss=compare_losses(rows),
        samples=tuple(samples),
        unanswered=unanswered,
        judge=tally(samples) if config.judge and samples else None,
        attention=models.attention.name,
        rivals=tuple(_compare(rows, samples, rival, config, judged) for rival in models.rivals),
        harness=_on_tasks(models, config),
        rows=models.rows,
    )


def _on_tasks(models: Models, config: EvaluateConfig) -> Harness | None:
    """The scores of base model, student and released student on tasks of lm-evaluation-harness, if there are any."""
    measured = {"base": (models.base, TrainedAttention()), "student": (models.student, models.attention)}
    measured |= {
        rival.role: (rival.folder, rival.attention)
        for rival in models.rivals
        if rival.role == RELEASED and rival.folder
    }
    return measure_tasks(measured, config, models.tasks, {"base": models.chat_template})


def _compare(
    rows: pa.Table, samples: Sequence[Sample], rival: Rival, config: EvaluateConfig, judged: Any
) -> Comparison:
    stored = read_rows(rival.rows)
    earlier, differing = comparable(ROWS.empty_table() if stored is None else stored, config)
    answers = answers_of(earlier, "student")
    pairs = [
        sample.model_copy(
            update={"base": answers[sample.row_id].text, "base_tokens": answers[sample.row_id].num_tokens}
        )
        for sample in samples
        if sample.row_id in answers
    ]
    return Comparison(
        version=rival.version,
        role=rival.role,
        change=change_on_common_rows(rows, earlier),
        judge=verdicts(judged(pairs)) if config.judge and pairs else None,
        measured_with=differing,
    )


def _lowest_ids(held_out: Dataset, num_samples: int) -> list[str]:
    """The `num_samples` lowest row ids; each block sends no more than that many to the driver."""
    lowest = held_out.map_batches(
        partial(_lowest_of_block, count=num_samples), batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    return heapq.nsmallest(num_samples, (row["row_id"] for row in lowest.iter_rows()))


def _lowest_of_block(rows: pa.Table, count: int) -> pa.Table:
    return rows.select(["row_id"]).sort_by("row_id").slice(0, count)


def sampled_rows(held_out: Dataset, num_samples: int) -> list[dict[str, Any]]:
    """The rows that both models answer as samples, with the columns TEXTS."""
    return _texts(held_out, _lowest_ids(held_out, num_samples))


def _texts(held_out: Dataset, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
    wanted = held_out.map_batches(partial(_rows_of, row_ids=list(sample_ids)), batch_format="pyarrow", num_cpus=0.5)
    return sorted(wanted.iter_rows(), key=lambda row: str(row["row_id"]))


def _rows_of(rows: pa.Table, row_ids: list[str]) -> pa.Table:
    texts = rows.select(list(TEXTS))
    return texts.filter(pc.is_in(texts["row_id"], pa.array(row_ids, pa.string())))


def _measure(
    held_out: Dataset,
    model: str,
    sample_ids: Sequence[str],
    config: EvaluateConfig,
    attention: TrainedAttention,
    chat_template: str = "",
) -> pa.Table:
    from operators.evaluate.model_actor import MEASURED, ModelActor  # imports torch, which the driver does not need

    own = {"attention": attention, "chat_template": chat_template}
    rows, actors = spread(held_out, config)
    measured = rows.map_batches(
        ModelActor,
        fn_constructor_kwargs={"model": model, "sample_ids": sample_ids, "config": config, **own},
        batch_size=config.batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        **config.resources(),
    )
    blocks: list[pa.Table] = ray.get(measured.to_arrow_refs())
    return pa.concat_tables([MEASURED.empty_table(), *(block for block in blocks if block.num_rows)])


def spread(held_out: Dataset, config: EvaluateConfig) -> tuple[Dataset, int]:
    """The rows in blocks for the actors, and how many actors have work; others would load a model for nothing.

    A block goes to one actor, and all rows of a refresh are often one block.
    """
    actors = min(config.actors, -(-held_out.count() // config.batch_rows))
    if actors < 2:
        return held_out, 1
    return held_out.repartition(target_num_rows_per_block=config.batch_rows), actors


def _side_by_side(texts: Sequence[dict[str, Any]], rows: pa.Table) -> list[Sample]:
    base, student = answers_of(rows, "base"), answers_of(rows, "student")
    return [
        Sample(
            row_id=row["row_id"],
            instruction=row["instruction"],
            input=row["input"] or "",
            reference=row["response"],
            turns_before=row["turns_before"] or "",
            base=base[row["row_id"]].text,
            student=student[row["row_id"]].text,
            base_tokens=base[row["row_id"]].num_tokens,
            student_tokens=student[row["row_id"]].num_tokens,
        )
        for row in texts
        if row["row_id"] in base and row["row_id"] in student
    ]
