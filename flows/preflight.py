"""Preflight checks: everything that can be known before a call is paid, in every run, in `--plan` and by `--doctor`."""

import os
import shutil
from pathlib import Path

from cluster.lease import is_leased
from cluster.runtime import cluster_nodes, exposed_address
from flows.placement import GIB, training_disk_bytes, weigh, weight_bytes
from flows.run import Run
from operators.models import ModelNotFoundError
from operators.stage import Finding
from operators.student.encode import EncodingError, load_tokenizer, require_template


class PreflightError(ValueError):
    """The run cannot work as configured; one line a problem."""


def preflight(run: Run, *, holds_lease: bool = False) -> list[Finding]:
    """Look at storage, source, models and cluster; what is fatal would end the run later, and cost more there.

    Args:
        run: what is to be done.
        holds_lease: this process holds the storage; else another that holds it is worth a warning.
    """
    models = _model_findings(run)
    found = [*_storage_findings(run, holds_lease), *_source_findings(run), *_cluster_findings(), *models]
    if not models:
        found += _student_findings(run)
        found += weigh(run.config, cluster_nodes(), weight_bytes(run.teacher.model), weight_bytes(run.student))
    return found


def require_sound(findings: list[Finding]) -> None:
    """Refuse a run that cannot work.

    Raises:
        PreflightError: a finding is fatal; the message is one line each.
    """
    fatal = [str(finding) for finding in findings if finding.fatal]
    if fatal:
        raise PreflightError("\n".join(fatal))


def _storage_findings(run: Run, holds_lease: bool) -> list[Finding]:
    storage = run.config.storage
    folder = Path(storage)
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Finding("storage", f"{folder} cannot be written; change its owner or give another by storage=<folder>")]
    found = []
    if not holds_lease and is_leased(storage):
        found.append(Finding("storage", f"another run is writing to {storage}; a second one is refused", fatal=False))
    need = training_disk_bytes(run.config.train, _student_bytes(run))
    free = shutil.disk_usage(folder).free
    if need > free:
        text = f"training writes about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free at {folder}; free space"
        found.append(Finding("storage", text))
    return found


def _student_bytes(run: Run) -> int:
    try:
        return weight_bytes(run.student)
    except ModelNotFoundError:
        return 0


def _cluster_findings() -> list[Finding]:
    address = exposed_address()
    if address is None:
        return []
    text = f"Ray at {address} runs commands for anyone who reaches it; start it with RAY_AUTH_MODE=token"
    return [Finding("cluster", text, fatal=False)]


def _source_findings(run: Run) -> list[Finding]:
    try:
        run.staleness.files_of(None)
    except (ValueError, OSError) as error:
        return [Finding("source.path", str(error))]
    return []


def _model_findings(run: Run) -> list[Finding]:
    found = []
    for key, resolve in (("teacher.model", lambda: run.teacher), ("student.model", lambda: run.student)):
        try:
            resolve()
        except ModelNotFoundError as error:
            found.append(Finding(key, str(error).removeprefix(f"{key}: ")))
    return found


def _student_findings(run: Run) -> list[Finding]:
    try:
        require_template(load_tokenizer(run.student))
    except (EncodingError, ValueError) as error:
        return [Finding("student.model", str(error))]
    return []
