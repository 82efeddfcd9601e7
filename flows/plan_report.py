"""The `--plan` report: the assets that a run would make and why, its teacher calls, and the resources it needs."""

from contextlib import suppress
from typing import TextIO

from ray.data import Dataset

from cluster.runtime import cluster_nodes
from flows.exit_codes import DONE, UNUSABLE
from flows.graph import RAW_INSTRUCTIONS, SELECTED_INSTRUCTIONS
from flows.placement import GIB, demands
from flows.run import Run
from flows.staleness import differences
from operators.models import ModelNotFoundError
from operators.read.read_instructions import read_instructions
from operators.redact import without_credentials
from operators.reflect import reflect_instructions, reflect_responses
from operators.reflect.reflect import Reflecting, reflection_calls
from operators.stage import Finding
from operators.teacher.budget import Tokens
from operators.train.memory import bytes_per_worker, measure


def print_plan(run: Run, refresh: str, findings: list[Finding], out: TextIO, *, canary: int = 0) -> int:
    """Print a line per asset, the expected teacher calls and resources; returns 2 if a run would be refused, else 0.

    Args:
        run: the configuration and its storage.
        refresh: the batch of source data.
        findings: from `preflight`.
        out: where to print.
        canary: number of teacher calls to make now, to predict the length of the other replies; they are kept.
    """
    refused = any(finding.fatal for finding in findings)
    out.write(f"plan of {run.config.name}, refresh {refresh}, storage {run.config.storage}\n")
    with run.store.looking():
        for asset, spec in run.specs.items():
            partition = refresh if spec.partitions_def is not None else None
            out.write(f"  {asset:<26}{_state(run, asset, partition, refresh)}\n")
    if not any(finding.key.startswith("source") and finding.fatal for finding in findings):
        with suppress(ModelNotFoundError):  # a finding already reports it
            out.writelines(f"  {line}\n" for line in _teacher_work(run, refresh, 0 if refused else canary))
    nodes = cluster_nodes()
    have = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))
    for demand in demands(run.config):
        out.write(f"  {demand.stage:<26}asks for {demand} of {have}\n")
    with suppress(ModelNotFoundError):
        out.write(f"  {'train':<26}{_training_memory(run)}\n")
    for finding in findings:
        out.write(f"  {'refused' if finding.fatal else 'warning'}: {finding}\n")
    return UNUSABLE if refused else DONE


def _training_memory(run: Run) -> str:
    size, train = measure(run.student, run.config.train.lora), run.config.train
    if not size.parameters:
        return "memory unknown, because the student is not in a folder"
    trained = f"{size.adapters:,} of adapters" if size.adapters else "all of them"
    held = bytes_per_worker(size, train) / GIB
    return f"{size.parameters:,} weights, trains {trained}: {held:.2f} GiB a worker without activations"


def _state(run: Run, asset: str, partition: str | None, planned: str) -> str:
    manifest = run.store.manifest(asset, partition)
    if manifest is None:
        return "new"
    try:
        reasons = differences(manifest.made_from, run.staleness.describe(asset, partition, planned))
    except ValueError as error:  # the source is gone; a finding already reports it
        return f"unknown: {without_credentials(str(error))}"
    rows = "" if manifest.rows is None else f", {manifest.rows} rows"
    return f"stale: {'; '.join(reasons)}{rows}" if reasons else f"cached{rows}"


def _teacher_work(run: Run, refresh: str, canary: int) -> list[str]:
    """Expected calls of both reflections; of the second one only if the rows that it reads exist."""
    raw = _rows(run, RAW_INSTRUCTIONS, refresh)
    if raw is None:
        raw = read_instructions(run.config.source, run.source(refresh), run.special_tokens)
    selected = _rows(run, SELECTED_INSTRUCTIONS, refresh)
    lines = [_calls_line(run, raw, reflect_instructions.ABOUT, canary)]
    if selected is not None:
        return [*lines, _calls_line(run, selected, reflect_responses.ABOUT, canary)]
    return [*lines, f"{reflect_responses.STAGE:<26}at most as many calls; known when selected_instructions is made"]


def _calls_line(run: Run, rows: Dataset, about: Reflecting, canary: int) -> str:
    calls = reflection_calls(rows, about, run.config.reflect, run.special_tokens)
    ledger = run.ledger()
    if canary:
        ledger.answer(calls, run.teacher, about.stage, first=canary)
    count = ledger.count_calls(calls, run.teacher, about.stage)
    tokens = Tokens(count["prompt_tokens"], count["reply_tokens"])
    budget = run.config.budget
    cost = f", cost {budget.cost(tokens):.2f}" if budget.cost(tokens) else ""
    spent = ledger.tokens() if budget.is_limited() else Tokens()
    exceeded = budget.exceeded_by(spent + tokens)
    reach = "about" if count["known_replies"] else "at most"  # known replies give a mean length, else the limit counts
    return (
        f"{about.stage:<26}{count['new']} new calls, {count['asked'] - count['new']} from the ledger, "
        f"{count['over_long']} over-long; "
        f"about {tokens.prompt} prompt and {reach} {tokens.generated} reply tokens{cost}"
        f"{f'; will stop at {exceeded}' if exceeded else ''}"
    )


def _rows(run: Run, asset: str, refresh: str) -> Dataset | None:
    return None if run.staleness.is_stale(asset, refresh, refresh) else run.store.rows(asset, [refresh])
