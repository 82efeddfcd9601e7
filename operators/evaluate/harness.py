"""Measures models on tasks of lm-evaluation-harness (the package lm_eval, which is optional).

Each model is measured in one process with the resources of an evaluation actor, one model after another, with the
number format, the attention and the context length of the other evaluations. What was measured is kept by the files of
the model and of the tasks, so base model and released student are measured once, and failed tasks again.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import RayError

from operators.evaluate.config import EvaluateConfig, HarnessConfig, TrainedAttention
from operators.evaluate.harness_tasks import OFFLINE, PACKAGE, open_tasks, package_folder
from operators.evaluate.results import Harness, TaskFailure, TaskScore
from operators.files.atomic import put_file
from operators.files.copies import read_text
from operators.progress import report_progress
from operators.stage import Finding

KEY = "evaluate.harness"
CHECK_LIMIT_S = 600.0
_RESAMPLES = 1000  # for the standard error of metrics that are no means
_STDERR = "_stderr"

Scores = list[dict[str, Any]]  # of one model: task, metric, higher_is_better, score, error; or task, reason


def examine_harness(config: HarnessConfig) -> list[Finding]:
    """Whether the package is there and each task can be loaded with its data; runs the tasks' code in a process."""
    if not config.tasks:
        return []
    if package_folder() is None:
        text = f"needs {PACKAGE}, which is not installed; `pip install lm_eval`, or leave the tasks out"
        return [Finding(f"{KEY}.tasks", text)]
    if config.include_path and not Path(config.include_path).is_dir():
        return [Finding(f"{KEY}.include_path", f"{config.include_path} is not a folder; give the one with the tasks")]
    command = [sys.executable, "-m", "operators.evaluate.harness_tasks", config.model_dump_json()]
    try:
        ended = subprocess.run(  # noqa: S603 - our own module
            command, env=_environment(config), capture_output=True, text=True, timeout=CHECK_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding(f"{KEY}.tasks", f"the tasks were not loaded in {CHECK_LIMIT_S:g} s; name fewer")]
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        return [Finding(f"{KEY}.tasks", f"{PACKAGE} cannot be used: {last[0][:300]}; install it with what it needs")]
    return [_finding(config, name, problem) for name, problem in json.loads(lines[-1]).items()]


def _environment(config: HarnessConfig) -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, **({} if config.download else OFFLINE)}


def _finding(config: HarnessConfig, name: str, problem: str) -> Finding:
    if name not in config.tasks:
        return Finding(f"{KEY}.include_path", f"{problem}; keep the code of tasks in their folder")
    offline = any(word in problem for word in ("offline", "Offline", "ConnectionError", "Couldn't reach"))
    cure = "name another"
    if offline and not config.download:
        cure = f"set {KEY}.download: true where the hub can be reached, or give its data as files"
    elif problem.startswith("no such") and not config.include_path:
        cure = f"`lm_eval ls tasks` lists them, and {KEY}.include_path adds a folder"
    return Finding(f"{KEY}.tasks", f"{name}: {problem}; {cure}")


def measure_tasks(
    models: Mapping[str, tuple[str, TrainedAttention]],
    config: EvaluateConfig,
    kept: str,
    templates: Mapping[str, str] = MappingProxyType({}),
) -> Harness | None:
    """Measure each model on each task; a task or a process that fails is counted and ends nothing.

    Args:
        models: role (base, student, released) -> folder or hub id, and the attention to use.
        config: of the evaluation, with the tasks.
        kept: folder for the scores by model and task; a path that all nodes share, or a URI.
        templates: role -> text that replaces the model's own chat template; "" keeps it.

    Returns:
        The scores; None if no task is configured.
    """
    if not config.harness.tasks:
        return None
    environment = {} if config.harness.download else OFFLINE
    # A process of its own: tasks change its working directory, and their code and data stay in it.
    measure = ray.remote(**config.resources(), max_calls=1, runtime_env={"env_vars": environment})(_measured)
    found: dict[str, Scores] = {}
    for role, (model, attention) in models.items():
        report_progress("evaluate", note=f"tasks, {role}")
        try:
            found[role] = ray.get(measure.remote(model, config, attention, kept, templates.get(role, "")))
        except (RayError, OSError) as error:
            reason = " ".join(str(error).split())[-300:]
            found[role] = [{"task": task, "reason": reason} for task in config.harness.tasks]
    return side_by_side(found)


def side_by_side(found: Mapping[str, Scores]) -> Harness:
    """The scores of all models, one entry for each metric of a task; the order is that of the first model."""
    together: dict[tuple[str, str], TaskScore] = {}
    failed = []
    for role, scores in found.items():
        for one in scores:
            if "reason" in one:
                failed.append(TaskFailure(role=role, task=one["task"], reason=one["reason"]))
                continue
            known = {key: one[key] for key in ("task", "metric", "higher_is_better")}
            entry = together.setdefault((one["task"], one["metric"]), TaskScore(**known))
            entry.scores[role] = one["score"]
            if one["error"] is not None:
                entry.errors[role] = one["error"]
    return Harness(version=_version(), scores=tuple(together.values()), failed=tuple(failed))


def _measured(model: str, config: EvaluateConfig, attention: TrainedAttention, kept: str, template: str) -> Scores:
    """The scores of one model: those that are kept for the same files and task, or new ones."""
    from operators.model_copy import on_this_disk
    from operators.models import model_revision
    from operators.student.config import templated

    model = on_this_disk(model)
    made_from = {
        "model": templated(model_revision(model), template),
        "tasks": config.harness.identity(),
        "attention": asdict(attention),
        "precision": config.precision,
        "max_tokens": config.max_tokens,
        "version": _version(),
    }
    places = {name: f"{kept}/{_key(made_from, name)}.json" for name in config.harness.tasks}
    known = {name: text for name, place in places.items() if (text := read_text(place)) is not None}
    missing = tuple(name for name in places if name not in known)
    asked = _ask(model, config.model_copy(update={"harness": _of(config.harness, missing)}), attention, template)
    for name, scores in asked.items():
        if not any("reason" in one for one in scores):
            put_file(places[name], json.dumps({"made_from": made_from, "task": name, "scores": scores}, indent=1))
    found = {name: json.loads(text)["scores"] for name, text in known.items()} | asked
    return [one for name in places for one in found[name]]


def _key(made_from: Mapping[str, Any], task: str) -> str:
    alone = {**made_from, "tasks": {**made_from["tasks"], "tasks": [task]}}  # whichever others are configured
    return hashlib.sha256(json.dumps(alone, sort_keys=True).encode()).hexdigest()[:16]


def _of(config: HarnessConfig, tasks: tuple[str, ...]) -> HarnessConfig:
    return config.model_copy(update={"tasks": tasks})


def _ask(model: str, config: EvaluateConfig, attention: TrainedAttention, template: str) -> dict[str, Scores]:
    if not config.harness.tasks:
        return {}
    manager = open_tasks(config.harness)
    from lm_eval.models.huggingface import HFLM

    from operators.evaluate.model_actor import attending
    from operators.student.encode import load_tokenizer
    from operators.student.nll import load_causal_lm
    from operators.student.pool import longest_context

    loaded = load_causal_lm(model, config)
    wrapped = HFLM(
        pretrained=loaded,
        tokenizer=load_tokenizer(model, template),
        batch_size=config.harness.batch_rows,
        max_length=longest_context(model, config.max_tokens),
        trust_remote_code=False,
    )
    found: dict[str, Scores] = {}
    with attending(loaded, attention):
        for task in config.harness.tasks:
            try:
                found[task] = _scores_of(wrapped, task, manager, config.harness)
            except Exception as error:  # noqa: BLE001 - a task's code may raise anything; the others go on
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                found[task] = [{"task": task, "reason": reason}]
    return found


def _scores_of(model: Any, task: str, manager: Any, config: HarnessConfig) -> Scores:
    from lm_eval import simple_evaluate

    ended = simple_evaluate(
        model,
        tasks=[task],
        num_fewshot=config.num_fewshot,
        limit=config.limit or None,
        apply_chat_template=config.chat_template,
        bootstrap_iters=_RESAMPLES,
        log_samples=False,
        task_manager=manager,
        confirm_run_unsafe_code=False,
    )
    found: Scores = []
    for name, values in ended["results"].items():
        better = ended["higher_is_better"].get(name, {})
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith(_STDERR) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {value}")
            error = values.get(f"{metric}{_STDERR},{chosen}")
            is_known = isinstance(error, int | float) and math.isfinite(error)  # it is "N/A" or NaN for one question
            found.append(
                {
                    "task": name,
                    "metric": metric if chosen == "none" else f"{metric} ({chosen})",
                    "higher_is_better": better.get(metric),
                    "score": float(value),
                    "error": float(error) if is_known else None,
                }
            )
    if not found:
        raise ValueError("the task gave no score")
    return found


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""
