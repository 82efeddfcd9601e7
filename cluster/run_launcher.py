"""Launches the daemon's runs as Ray jobs `dagster-run-<id>`, and leaves runs of the command line alone."""

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # what dagster-ray itself builds on
from dagster_ray import RayRunLauncher

from cluster.dagster_home import DRIVER_TAG, driver_is_dead


class RayJobLauncher(RayRunLauncher):
    """dagster-ray's launcher, which by itself reports runs of the command line as failed: they have no Ray job."""

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Ask Ray about runs that are Ray jobs, and the operating system about runs that carry the driver tag."""
        if DRIVER_TAG not in run.tags:
            health: CheckRunHealthResult = super().check_run_worker_health(run)
            return health
        if driver_is_dead(run):
            return CheckRunHealthResult(WorkerStatus.FAILED, "its driver was killed")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
