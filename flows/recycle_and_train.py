#!/usr/bin/env python
"""Recycle an instruction data set with a teacher, train a student on it, and say whether it got better.

    flows/recycle_and_train.py --config configs/demo.yaml [dotted.key=value ...] [--plan] [--select ASSET,...]
                               [--refresh KEY]

The whole system is the graph in this file: each asset names its inputs and calls one operator. An asset returns a
recipe; the store carries it out only if code, configuration or inputs have changed since it was last made.
"""
# No `from __future__ import annotations` here: Dagster reads the annotations.

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `ray job submit flows/recycle_and_train.py`

import dagster as dg
from ray.data import Dataset

from cluster.storage import Recipe
from flows.checks import CHECKS
from flows.command import command
from flows.config import evaluate_config
from flows.graph import CONFIG_KEYS, ONLY_ROWS, Graph
from flows.lineage import lineage_of
from flows.releases import models_of
from flows.results import results_of
from flows.retention import DELETED_STUDENTS, prune_students
from flows.run import Run, rows_where
from flows.schedules import definitions
from flows.student_files import note_checksums, require_undamaged
from flows.training_start import GENERAL_OUTCOMES, rows_to_pack, starting_student
from operators.columns import HELD_OUT
from operators.evaluate.alpaca_eval import alpaca_eval_files
from operators.evaluate.evaluate import evaluate
from operators.evaluate.release import release as decide_release
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, Release
from operators.files.atomic import put_file
from operators.publish.publish import publish
from operators.reflect.filter_rewrites import filter_rewrites
from operators.reflect.reflect import count_unread, reflection_version
from operators.reflect.reflect_instructions import ABOUT as INSTRUCTIONS
from operators.reflect.reflect_instructions import reflect_instructions
from operators.reflect.reflect_responses import ABOUT as RESPONSES
from operators.reflect.reflect_responses import reflect_responses
from operators.report.report import build_report
from operators.select.select import select_instructions, select_responses
from operators.train.pack import count_packed, pack
from operators.train.result import TrainResult

REFRESHES = dg.DynamicPartitionsDefinition(name="refresh")
RunResource = dg.ResourceParam[Run]


def uses(*sections: str, only_rows: bool = False) -> dict[str, Any]:
    """Name the sections of the configuration that an asset depends on; changes of other sections do not make it stale.

    With `only_rows`, a refresh without rows to train on or to evaluate on does not make it stale either.
    """
    return {CONFIG_KEYS: list(sections), ONLY_ROWS: only_rows}


@dg.asset(
    partitions_def=REFRESHES,
    group_name="recycle",
    kinds={"ray"},
    code_version="4",
    metadata=uses("source", "deduplicate", "decontaminate", "steps"),
)
def raw_instructions(context: dg.AssetExecutionContext, run: RunResource) -> Recipe:
    """The source, one row per record; bad, duplicate, held-out and contaminated records have their reason."""
    key = context.partition_key
    return Recipe(partial(run.raw_rows, key), metrics=partial(run.raw_metrics, key))


@dg.asset(partitions_def=REFRESHES, group_name="evaluate", kinds={"ray"}, code_version="1")
def held_out(raw_instructions: Dataset) -> Recipe:
    """Records kept from teacher and training, for evaluation."""
    return Recipe(partial(rows_where, raw_instructions, HELD_OUT))


@dg.asset(
    partitions_def=REFRESHES,
    group_name="recycle",
    kinds={"ray", "vllm"},
    code_version=reflection_version(INSTRUCTIONS),
    metadata=uses("reflect", "teacher"),
)
def instruction_reflections(raw_instructions: Dataset, run: RunResource) -> Recipe:
    """The teacher's critique of every instruction, and a better one with its own answer."""
    ledger = run.asking()
    return Recipe(
        lambda: reflect_instructions(raw_instructions, run.reflection(ledger)),
        metrics=lambda rows: ledger.metrics() | count_unread(rows, INSTRUCTIONS),
    )


@dg.asset(
    partitions_def=REFRESHES,
    group_name="recycle",
    kinds={"ray", "pytorch"},
    code_version="4",
    metadata=uses("filter", "decontaminate", "select", "score", "student"),
)
def selected_instructions(
    context: dg.AssetExecutionContext, instruction_reflections: Dataset, run: RunResource
) -> Recipe:
    """The student's choice by IFD: the original pair or the better instruction with its answer."""
    ledger = run.asking()

    def build() -> Dataset:
        index = run.evaluation_index(instruction_reflections, context.partition_key)
        usable = filter_rewrites(instruction_reflections, INSTRUCTIONS, run.config.filter, index)
        return select_instructions(usable, run.config.select, run.scorer, run.judge(ledger))

    return Recipe(build, metrics=lambda _: ledger.metrics())


@dg.asset(
    partitions_def=REFRESHES,
    group_name="recycle",
    kinds={"ray", "vllm"},
    code_version=reflection_version(RESPONSES),
    metadata=uses("reflect", "teacher"),
)
def response_reflections(selected_instructions: Dataset, run: RunResource) -> Recipe:
    """The teacher's critique of every selected response, and a better one."""
    ledger = run.asking()
    return Recipe(
        lambda: reflect_responses(selected_instructions, run.reflection(ledger)),
        metrics=lambda rows: ledger.metrics() | count_unread(rows, RESPONSES),
    )


@dg.asset(
    partitions_def=REFRESHES,
    group_name="recycle",
    kinds={"ray", "pytorch"},
    code_version="4",
    metadata=uses("filter", "select", "score", "student"),
)
def recycled_instructions(response_reflections: Dataset, run: RunResource) -> Recipe:
    """The student's choice by r-IFD, and with it the one outcome of every row."""
    config, ledger = run.config, run.asking()

    def build() -> Dataset:
        usable = filter_rewrites(response_reflections, RESPONSES, config.filter)
        return select_responses(usable, config.select, run.scorer, run.judge(ledger))

    return Recipe(build, metrics=lambda _: ledger.metrics())


@dg.asset(
    group_name="recycle", kinds={"parquet"}, code_version="2", metadata=uses("publish", "teacher", "student", "reflect")
)
def published_dataset(recycled_instructions: Dataset, run: RunResource) -> Recipe:
    """The recycled instructions of all refreshes for others to load, with a card and their lineage."""
    return Recipe(lambda: publish(recycled_instructions, run.path("published"), lineage_of(run), run.config.publish))


@dg.asset(group_name="train", kinds={"ray"}, code_version="3", metadata=uses("pack", "student", only_rows=True))
def packed_sequences(recycled_instructions: Dataset, run: RunResource) -> Recipe:
    """The recycled instructions of all refreshes as token sequences of one length, documents kept apart."""
    config, template = run.config.pack, run.config.student.template
    general: dict[str, int] = {}
    return Recipe(
        lambda: pack(rows_to_pack(run, recycled_instructions, general), config, run.student, template),
        metrics=lambda packs: count_packed(packs) | ({GENERAL_OUTCOMES: general} if general else {}),
    )


@dg.asset(group_name="train", kinds={"ray", "deepspeed"}, code_version="2", metadata=uses("train", "student"))
def student(packed_sequences: Dataset, run: RunResource) -> Recipe:
    """The student, fine-tuned with NEFTune; a Hugging Face folder under students/<version>/."""
    version = run.student_version()
    folder = run.path("students", version)

    def build() -> TrainResult:
        from operators.train.train import train  # here, because it imports torch, which takes seconds

        start = starting_student(run, folder)
        trained = train(packed_sequences, run.config.train, start.student, folder, run.config.student.template)
        note_checksums(folder)
        notes = [*([start.note] if start.note else []), *trained.notes]
        return trained.model_copy(update={"version": version, "folder": folder, "notes": notes})

    return Recipe(build)


@dg.asset(
    group_name="evaluate",
    kinds={"ray", "vllm"},
    code_version="2",
    metadata=uses("evaluate", "teacher", "student", only_rows=True),
)
def evaluation(held_out: Dataset, student: TrainResult, run: RunResource) -> Recipe:
    """The student against its base model and earlier students: loss on held-out records, the teacher's judgement."""
    ledger = run.ledger()

    def build() -> Evaluation:
        require_undamaged(student.folder)
        models = models_of(run, student.version, student.folder)
        made = evaluate(held_out, evaluate_config(run.config), models, run.teacher, ledger, run.special_tokens)
        for name, text in alpaca_eval_files(made.samples, run.config.student.model, student.version).items():
            put_file(run.path("evaluations", f"{student.version}.{name}"), text)
        return made

    return Recipe(build, metrics=lambda _: ledger.metrics())


@dg.asset(group_name="evaluate", code_version="2", metadata=uses("release"))
def release(evaluation: Evaluation, student: TrainResult, run: RunResource) -> Recipe:
    """Whether the student replaces the released one, and why."""
    history, storage = ReleaseHistory(run.config.storage), run.config.storage
    decide = partial(decide_release, evaluation, student.version, history, run.config.release)
    prune = partial(prune_students, storage, run.config.release.keep_students, student.version)
    return Recipe(decide, metrics=lambda _: {DELETED_STUDENTS: dict.fromkeys(prune(), 1)})


@dg.asset(group_name="evaluate", kinds={"html"}, code_version="2", metadata=uses("name", "report", "budget"))
def report(
    recycled_instructions: Dataset,
    packed_sequences: Dataset,
    student: TrainResult,
    evaluation: Evaluation,
    release: Release,
    run: RunResource,
) -> Recipe:
    """The report for people, reports/<run>.html, and the same figures as JSON."""

    def build() -> dict[str, Any]:
        config = run.config
        results = results_of(run, student.model_dump(mode="json"), evaluation, release)
        data = (recycled_instructions, packed_sequences)
        made = build_report(config.name, *data, results, config.model_dump(mode="json"), config.report)
        put_file(run.path("reports", f"{config.name}.html"), made.html)
        put_file(run.path("reports", f"{config.name}.json"), json.dumps(made.figures, indent=1))
        return {"html": run.path("reports", f"{config.name}.html"), "figures": made.figures}

    return Recipe(build)


_ASSETS = [
    raw_instructions,
    held_out,
    instruction_reflections,
    selected_instructions,
    response_reflections,
    recycled_instructions,
    published_dataset,
    packed_sequences,
    student,
    evaluation,
    release,
    report,
]
GRAPH = Graph(_ASSETS, CHECKS, REFRESHES)


@dg.definitions
def defs() -> dg.Definitions:
    """What `dagster dev -m flows.recycle_and_train` serves, configured by $RECYCLE_CONFIG and $RECYCLE_OVERRIDES."""
    return definitions(GRAPH)


def main() -> int:
    """Run the command of the command line; returns the exit code, see `flows.command`."""
    return command(GRAPH, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
