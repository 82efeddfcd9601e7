"""Looks before it leaps: what a run would do and why, what it would ask of the teacher, and if it can be placed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import dagster as dg
from ray.data import Dataset

from cluster.runtime import cluster_resources, node_memory
from flows.graph import RAW_INSTRUCTIONS, SELECTED_INSTRUCTIONS
from flows.run import Run
from operators.read.read_instructions import read_instructions
from operators.reflect import reflect_instructions, reflect_responses
from operators.reflect.reflect import Reflecting, reflection_calls
from operators.student.encode import EncodingError, load_tokenizer, require_template
from operators.teacher.budget import Tokens

GIB = 1 << 30
# float32 weights, gradients and Adam's two moments; ZeRO divides all but the weights (and at stage 3 those) by workers.
BYTES_PER_PARAMETER_STATE = 12


class PreflightError(ValueError):
    """The run cannot work as configured; one line a problem."""


def preflight(run: Run) -> list[str]:
    """Check models, templates, memory and placement before any actor starts; returns one line a problem."""
    return [*_template_problems(run), *_placement_problems(run), *_memory_problems(run), *_source_problems(run)]


def print_plan(
    run: Run,
    specs: Mapping[str, dg.AssetSpec],
    refresh: str,
    problems: list[str],
    out: TextIO,
    *,
    canary: int = 0,
) -> int:
    """Print a line an asset and the teacher's work to come; 2 if the plan cannot be placed, else 0.

    Args:
        run: the configuration and its storage.
        specs: the assets, in order.
        refresh: the batch of source data that it is about.
        problems: of `preflight`.
        out: where to print.
        canary: teacher calls to make, so that the length of all replies is predicted from theirs; they are kept.
    """
    out.write(f"plan of {run.config.name}, refresh {refresh}, storage {run.config.storage}\n")
    for asset, spec in specs.items():
        partition = refresh if spec.partitions_def is not None else None
        out.write(f"  {asset:<26}{_state(run, asset, partition)}\n")
    for line in _teacher_work(run, refresh, 0 if problems else canary):
        out.write(f"  {line}\n")
    have = cluster_resources()
    for stage, wanted in _wanted(run).items():
        asked = ", ".join(f"{count:g} {name}" for name, count in wanted.items() if count)
        out.write(f"  {stage:<26}asks for {asked} of {have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU\n")
    for problem in problems:
        out.write(f"  refused: {problem}\n")
    return 2 if problems else 0


def _state(run: Run, asset: str, refresh: str | None) -> str:
    manifest = run.store.manifest(asset, refresh)
    if manifest is None:
        return "new"
    now = run.store.describe(asset, refresh)
    reasons = _differences(manifest["made_from"], now)
    rows = f", {manifest['rows']} rows" if "rows" in manifest else ""
    return f"stale: {'; '.join(reasons)}{rows}" if reasons else f"cached{rows}"


def _differences(before: dict[str, object], now: dict[str, object], prefix: str = "") -> list[str]:
    """Name what changed: `config.train.max_steps 8 -> 12`, `inputs.raw_instructions changed`."""
    reasons = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            reasons += _differences(old, new, f"{name}.")
        elif prefix == "inputs." or key == "files":
            reasons.append(f"{name} changed")
        else:
            reasons.append(f"{name} {old} -> {new}")
    return reasons


def _teacher_work(run: Run, refresh: str, canary: int) -> list[str]:
    """Calls to come of both reflections; of the second only if the rows that it reflects on are there."""
    raw = _rows(run, RAW_INSTRUCTIONS, refresh)
    if raw is None:
        raw = read_instructions(run.config.source, run.source(refresh), run.special_tokens)
    selected = _rows(run, SELECTED_INSTRUCTIONS, refresh)
    lines = [_calls_line(run, raw, reflect_instructions.ABOUT, canary)]
    if selected is not None:
        return [*lines, _calls_line(run, selected, reflect_responses.ABOUT, canary)]
    return [*lines, f"{reflect_responses.STAGE:<26}at most as many calls; known when selected_instructions is made"]


def _calls_line(run: Run, rows: Dataset, about: Reflecting, canary: int) -> str:
    calls = reflection_calls(rows, about, run.config.reflect)
    ledger = run.ledger()
    if canary:
        ledger.answer(calls, run.teacher, about.stage, first=canary)
    count = ledger.count_calls(calls, run.teacher, about.stage)
    tokens = Tokens(count["prompt_tokens"], count["reply_tokens"])
    budget = run.config.budget
    cost = f", cost {budget.cost(tokens):.2f}" if budget.cost(tokens) else ""
    spent = ledger.tokens() if budget.is_limited() else Tokens()
    exceeded = budget.exceeded_by(spent + tokens)
    reach = "about" if count["known_replies"] else "at most"  # a canary, or an earlier run, tells how long replies are
    return (
        f"{about.stage:<26}{count['new']} new calls, {count['asked'] - count['new']} from the ledger, "
        f"{count['over_long']} over-long; "
        f"about {tokens.prompt} prompt and {reach} {tokens.generated} reply tokens{cost}"
        f"{f'; will stop at {exceeded}' if exceeded else ''}"
    )


def _rows(run: Run, asset: str, refresh: str) -> Dataset | None:
    manifest = run.store.manifest(asset, refresh)
    if manifest is None or manifest["fingerprint"] != run.store.current_fingerprint(asset, refresh):
        return None
    return run.store.rows(asset, [refresh])


def _wanted(run: Run) -> dict[str, dict[str, float]]:
    """Resources that each stage needs at once, at its smallest."""
    teacher, train = run.teacher, run.config.train
    wanted = {}
    if teacher.backend == "vllm":
        engines = teacher.replicas if isinstance(teacher.replicas, int) else teacher.replicas[0]
        on_cpu = {"CPU": teacher.cpus_per_replica, "GPU": 0.0}
        on_gpu = {"CPU": float(teacher.tensor_parallel), "GPU": float(teacher.tensor_parallel)}
        each = on_cpu if teacher.device == "cpu" else on_gpu
        wanted["teacher"] = {name: engines * count for name, count in each.items()}
    workers = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    wanted["train"] = {name: train.num_workers * count for name, count in workers.items()}
    return wanted


def _placement_problems(run: Run) -> list[str]:
    have = cluster_resources()
    cures = {"teacher": "lower teacher.replicas", "train": "lower train.num_workers"}
    return [
        f"{stage}: needs {count:g} {name} at once, the cluster has {have.get(name, 0):g}; {cures[stage]} or add nodes"
        for stage, wanted in _wanted(run).items()
        for name, count in wanted.items()
        if count > have.get(name, 0)
    ]


def _memory_problems(run: Run) -> list[str]:
    """Weights against the memory of the largest node; models that are not in a folder are not weighed."""
    nodes = node_memory()
    largest, problems = max(nodes), []
    teacher, train = run.teacher, run.config.train
    if teacher.backend == "vllm" and teacher.device == "cpu":
        need = _weight_bytes(teacher.model) + teacher.cpu_kv_cache_gib * GIB
        if need > largest:
            problems.append(_too_big("teacher.model", need, largest, "lower teacher.cpu_kv_cache_gib"))
    if train.gpus_per_worker == 0:
        weights = _weight_bytes(run.student)
        need = train.num_workers * weights + weights // 4 * BYTES_PER_PARAMETER_STATE
        if need > largest * len(nodes):
            problems.append(_too_big("student.model", need, largest, "lower train.num_workers"))
    return problems


def _too_big(key: str, need: int, have: float, cure: str) -> str:
    return f"{key}: needs about {need / GIB:.1f} GiB, a node has {have / GIB:.1f} GiB; take a smaller model or {cure}"


def _weight_bytes(model: str) -> int:
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def _template_problems(run: Run) -> list[str]:
    try:
        require_template(load_tokenizer(run.student))
    except (EncodingError, ValueError) as error:
        return [f"student.model: {error}"]
    return []


def _source_problems(run: Run) -> list[str]:
    try:
        run.describer.files_of(None)
    except (ValueError, OSError) as error:
        return [f"source.path: {error}"]
    return []
