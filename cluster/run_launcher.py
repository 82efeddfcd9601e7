"""Launches the daemon's runs as Ray jobs `dagster-run-<id>`, and leaves runs of the command line alone."""

import time
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # what dagster-ray itself builds on
from dagster_ray import RayRunLauncher

from cluster.dagster_home import DRIVER_TAG, is_alive

PATIENCE_S = 120.0  # how long a run may hold no lease while Ray does not know its job: it may be starting


class RayJobLauncher(RayRunLauncher):
    """dagster-ray's launcher, which by itself reports runs of the command line as failed: they have no Ray job.

    It also reports a run as failed whenever Ray's API does not answer. Here the storage's lease decides then: whoever
    works holds it, on whatever machine.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of `RayRunLauncher`."""
        super().__init__(*args, **kwargs)
        self._without_sign_since: dict[str, float] = {}  # by run id, on this process's own monotonic clock

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Ask Ray about its jobs, and the lease about runs of the command line and where Ray is silent."""
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
        """What Ray says; UNKNOWN if it does not answer or does not know the job."""
        try:
            health: CheckRunHealthResult = super().check_run_worker_health(run)
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            return CheckRunHealthResult(WorkerStatus.UNKNOWN, str(error))
        return health
