"""Launches the daemon's runs as Ray jobs `dagster-run-<id>`, and does not touch runs of the command line."""

import time
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # what dagster-ray itself builds on
from dagster_ray import RayRunLauncher

from cluster.dagster_home import DRIVER_TAG, is_alive

PATIENCE_S = 120.0  # a run that may be starting: for this long, Ray may not know its job and it may hold no lease


class RayJobLauncher(RayRunLauncher):
    """A launcher that also asks the storage's lease whether a run is alive: a working run holds it, on any machine.

    dagster-ray's launcher reports runs of the command line as failed, because they have no Ray job, and any run as
    failed if Ray's API does not answer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `RayRunLauncher`."""
        super().__init__(*args, **kwargs)
        self._without_sign_since: dict[str, float] = {}  # by run id, on this process's own monotonic clock

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Ask Ray about its jobs; ask the lease about runs of the command line, and if Ray does not answer."""
        storage = str(Path(self._instance.root_directory).parent)
        if DRIVER_TAG in run.tags:
            if is_alive(run, storage):
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            return CheckRunHealthResult(WorkerStatus.FAILED, "its driver was killed: nobody holds the storage")
        health = self._asked(run)
        if health.status != WorkerStatus.UNKNOWN or is_alive(run, storage):
            self._without_sign_since.pop(run.run_id, None)
            return CheckRunHealthResult(WorkerStatus.RUNNING) if health.status == WorkerStatus.UNKNOWN else health
        now = time.monotonic()
        if now - self._without_sign_since.setdefault(run.run_id, now) < PATIENCE_S:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"for {PATIENCE_S:g} s Ray did not know its job and nobody held the storage"
        )

    def _asked(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """The health that Ray reports; UNKNOWN if it does not answer or does not know the job."""
        try:
            health: CheckRunHealthResult = super().check_run_worker_health(run)
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            return CheckRunHealthResult(WorkerStatus.UNKNOWN, str(error))
        return health
