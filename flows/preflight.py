"""Preflight checks: everything that can be checked before the first teacher call, in a run, `--plan` and `--doctor`."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cluster.files import StorageError
from cluster.lease import is_leased
from cluster.runtime import cluster_nodes, exposed_address
from flows.config import RunConfig
from flows.graph import (
    EVALUATION,
    INSTRUCTION_REFLECTIONS,
    PACKED_SEQUENCES,
    PUBLISHED_DATASET,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    RESPONSE_REFLECTIONS,
    SELECTED_INSTRUCTIONS,
    STUDENT,
)
from flows.placement import GIB, idle_gpus, training_disk_bytes, weigh, weight_bytes
from flows.retries import describe
from flows.run import MOST_NAMED, Run
from flows.source_versions import RefreshFile
from flows.storage_findings import damage_findings, place_findings
from operators.evaluate.harness import examine_harness
from operators.files.places import in_bucket
from operators.models import ModelNotFoundError
from operators.publish.hub import TOKEN_VARIABLE
from operators.read.doctor import examine_source, first_rows
from operators.read.drop_contaminated import examine_files
from operators.read.own_steps import examine_steps
from operators.read.source_files import files_of_other_splits, list_source_files, shown, unknown_files
from operators.select.reward import KEY as REWARD_MODEL
from operators.select.reward import examine_reward_model
from operators.stage import Finding
from operators.student.doctor import StudentNeeds, examine_student
from operators.teacher.doctor import check_teacher
from operators.teacher.variants import every_teacher
from operators.train.memory import StudentSize, measure
from operators.train.mixture import MixtureConfig
from operators.train.optimizer import missing_package
from operators.train.quantise import missing_package as missing_quantisation
from operators.train.refusals import unused
from operators.train.trackers import missing_trackers

NEED_REWARD = (SELECTED_INSTRUCTIONS, RECYCLED_INSTRUCTIONS)
NEED_STUDENT = (SELECTED_INSTRUCTIONS, RECYCLED_INSTRUCTIONS, PACKED_SEQUENCES, STUDENT, EVALUATION)


class PreflightError(ValueError):
    """The run cannot work as configured; the message has one line per problem."""


def preflight(
    run: Run, refresh: str, selected: Sequence[str] = (), *, thorough: bool = False, holds_lease: bool = False
) -> list[Finding]:
    """Check storage, source, models and cluster; a fatal finding would end the run later, after more work.

    Args:
        run: to check.
        refresh: the batch of source data.
        selected: the assets to make; empty means all.
        thorough: check models even if everything that they make is up to date.
        holds_lease: whether this process holds the storage; if not, a holder gives a warning.
    """
    models = _model_findings(run)
    found = [
        *_storage_findings(run, holds_lease),
        *place_findings(run),
        *(damage_findings(run) if thorough else []),
        *_source_findings(run, refresh, selected),
        *_cluster_findings(run.config),
        *models,
    ]
    general = [PACKED_SEQUENCES] * bool(run.config.pack.mixture.general)
    if thorough or _is_needed(run, refresh, [RAW_INSTRUCTIONS, SELECTED_INSTRUCTIONS, *general], selected):
        found += examine_files(run.config.decontaminate)
    if thorough or _is_needed(run, refresh, (PUBLISHED_DATASET,), selected):
        found += _hub_findings(run.config)
    if not models and (thorough or _is_needed(run, refresh, NEED_STUDENT, selected)):
        found += examine_student(run.student, student_needs(run.config))
    if run.config.evaluate.harness.tasks and (thorough or _is_needed(run, refresh, (EVALUATION,), selected)):
        found += examine_harness(run.config.evaluate.harness)
    if thorough or _is_needed(run, refresh, (STUDENT,), selected):
        found += [
            *(*_resume_findings(run.config), *_package_findings(run.config)),
            *(*_general_findings(run.config.pack.mixture), *unused(run.config.train)),
        ]
    if not models and run.reward_model and (thorough or _is_needed(run, refresh, NEED_REWARD, selected)):
        found += examine_reward_model(run.reward_model)
    if not models and (thorough or _is_needed(run, refresh, _that_ask(run.config), selected)):
        found += check_teacher(run.teacher)
    if not models:
        teachers = {key: weight_bytes(teacher.model) for key, teacher in every_teacher(run.teacher)}
        size = measure(run.student, run.config.train.lora)
        nodes = cluster_nodes()
        found += [*weigh(run.config, nodes, teachers, weight_bytes(run.student), size), *idle_gpus(run.config, nodes)]
    return found


def _that_ask(config: RunConfig) -> list[str]:
    """The assets that need teacher calls, for reflection or as a judge."""
    judging = [*(NEED_REWARD if config.select.policy == "judge" else ()), *([EVALUATION] * config.evaluate.judge)]
    return [INSTRUCTION_REFLECTIONS, RESPONSE_REFLECTIONS, *judging]


def require_sound(findings: list[Finding]) -> None:
    """Refuse a run that cannot work.

    Raises:
        PreflightError: a finding is fatal; the message has one line per finding.
    """
    fatal = [str(finding) for finding in findings if finding.fatal]
    if fatal:
        raise PreflightError("\n".join(fatal))


def _storage_findings(run: Run, holds_lease: bool) -> list[Finding]:
    storage = run.config.storage
    busy = Finding("storage", f"another run is writing to {storage}; a second one is refused", fatal=False)
    if in_bucket(storage):
        try:
            return [busy] if not holds_lease and is_leased(storage) else []
        except StorageError as error:
            return [Finding("storage", str(error).removeprefix("storage: "))]
    folder = Path(storage)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [Finding("storage", f"{folder} is a file, not a folder; give another by storage=<folder>")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Finding("storage", f"{folder} cannot be written; change its owner or give another by storage=<folder>")]
    found = []
    if not holds_lease and is_leased(storage):
        found.append(busy)
    need = training_disk_bytes(run.config.train, *_student_size(run))
    free = shutil.disk_usage(folder).free
    if need > free:
        text = f"training writes about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free at {folder}; free space"
        found.append(Finding("storage", text))
    return found


def _hub_findings(config: RunConfig) -> list[Finding]:
    if not config.publish.hub_repo or os.environ.get(TOKEN_VARIABLE):
        return []
    text = f"{config.publish.hub_repo} cannot be pushed to: the environment has no {TOKEN_VARIABLE}"
    return [Finding("publish.hub_repo", f"{text}; set it to a token that may write, or empty publish.hub_repo")]


def _package_findings(config: RunConfig) -> list[Finding]:
    train = config.train
    missing = (missing_package(train), missing_quantisation(train), missing_trackers(train.trackers))
    found = (text.partition(": ") for text in missing if text)
    return [Finding(key, text) for key, _, text in found]


def _resume_findings(config: RunConfig) -> list[Finding]:
    if not config.train.resume_from:
        return []
    from operators.train.checkpoint import named_checkpoint  # here, because it imports torch, which takes a second

    try:
        named_checkpoint(config.train.resume_from, config.train.sharding)
    except ValueError as error:
        return [Finding("train.resume_from", str(error).removeprefix("train: train.resume_from: "))]
    return []


def _student_size(run: Run) -> tuple[int, StudentSize]:
    try:
        return weight_bytes(run.student), measure(run.student, run.config.train.lora)
    except ModelNotFoundError:
        return 0, StudentSize()


def _cluster_findings(config: RunConfig) -> list[Finding]:
    address = exposed_address()
    if address is None:
        return []
    text = (
        f"Ray at {address} runs commands for anyone who reaches it; start it with RAY_AUTH_MODE=token, as in the "
        "README, or set allow_open_ray: true if nobody else can reach it"
    )
    return [Finding("allow_open_ray", text, fatal=not config.allow_open_ray)]


def _source_findings(run: Run, refresh: str, selected: Sequence[str]) -> list[Finding]:
    gone = run.staleness.files.gone(refresh)
    try:
        there = run.staleness.files.files_of(refresh)
    except (ValueError, OSError) as error:
        if not run.staleness.files.taken(refresh):
            return [Finding("source.path", str(error))]
        there = []
    if selected and RAW_INSTRUCTIONS not in selected:
        return []
    return [*_waiting_findings(run, refresh), *_file_findings(run, refresh, gone, there)]


def _waiting_findings(run: Run, refresh: str) -> list[Finding]:
    """Findings about files that no refresh takes, and about refreshes that were given up."""
    found = []
    if unknown := _unknown_files(run):
        text = f"{shown(unknown)}: not read, unknown format; convert them"
        found.append(Finding("source.path", text, fatal=False))
    if left_out := _left_out(run):
        text = f"{left_out} are not read; source.split=all reads every file"
        found.append(Finding("source.split", text, fatal=False))
    if unreadable := run.staleness.files.unreadable():
        text = f"{_named(unreadable)} cannot be read, so no refresh takes them; give this user the right to read them"
        found.append(Finding("source.path", text, fatal=False))
    found += [Finding("schedule", line, fatal=False) for line in run.requests.damaged()]
    for request in run.requests.all():
        if request.given_up is not None and request.key != refresh:
            text = f"{describe(request)}; `recycle-and-train retry {run.config.storage} {request.key}`"
            found.append(Finding("schedule", text, fatal=False))
    return found


def _left_out(run: Run) -> str:
    """The files of other splits, such as "2 files of the split test (a, b)", joined; "" if there are none."""
    try:
        found = files_of_other_splits(run.config.source.path, run.config.source.split)
    except (ValueError, OSError):  # another finding reports it
        return ""
    return ", ".join(f"{len(names)} files of the split {split} ({_named(names)})" for split, names in found.items())


def _unknown_files(run: Run) -> str:
    try:
        return unknown_files(run.config.source.path)
    except (ValueError, OSError):  # the rows of a source that cannot be reached are kept, so the run may go on
        return ""


def _file_findings(run: Run, refresh: str, gone: Sequence[str], there: Sequence[RefreshFile]) -> list[Finding]:
    if not there and not run.staleness.files.taken(refresh):
        text = f"{shown(run.config.source.path)} has no file that no other refresh has taken or asked for"
        return [Finding("source.path", text)]
    paths = [file.path for file in there]
    found = examine_source(run.config.source, paths) if there else []
    if run.config.steps.functions and not any(finding.fatal for finding in found):
        found += examine_steps(run.config.steps, first_rows(run.config.source, paths))
    if gone:
        kept = "the rows that were read from them stay; --retract FILE takes them out"
        found.append(
            Finding("source.path", f"{_named(gone)} of refresh {refresh} are gone or changed: {kept}", fatal=False)
        )
    return found


def _named(files: Sequence[str]) -> str:
    return ", ".join(files[:MOST_NAMED])


def _model_findings(run: Run) -> list[Finding]:
    found = []
    for key, resolve in (
        ("teacher.model", lambda: run.teacher),
        ("student.model", lambda: run.student),
        (REWARD_MODEL, lambda: run.reward_model),
    ):
        try:
            resolve()
        except ModelNotFoundError as error:
            found.append(Finding(key, str(error).removeprefix(f"{key}: ")))
    return [*found, *run.config.student.findings()]


def _general_findings(mixture: MixtureConfig) -> list[Finding]:
    try:
        if mixture.general:
            list_source_files(mixture.general)
        return []
    except ValueError:
        return [Finding("pack.mixture.general", f"{shown(mixture.general)} matches no file; give another")]


def student_needs(config: RunConfig) -> StudentNeeds:
    """The configuration's requirements for the student."""
    train = config.train
    layers = train.hyper_attention_layers if train.attention == "hyper_attention" else None
    sizes = (config.pack.max_tokens, config.pack.packed, layers, train.sequence_parallel)
    return StudentNeeds(*sizes, train.neftune_alpha, config.student.template, config.student.chat_template)


def _is_needed(run: Run, refresh: str, assets: Sequence[str], selected: Sequence[str]) -> bool:
    """Whether this run makes one of these assets."""
    wanted = [asset for asset in assets if not selected or asset in selected]
    keys = {asset: refresh if run.specs[asset].partitions_def is not None else None for asset in wanted}
    try:
        return any(run.staleness.is_stale(asset, key, refresh) for asset, key in keys.items())
    except (ValueError, OSError):  # the source cannot be read; another finding reports it
        return False
