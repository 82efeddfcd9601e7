"""Dagster's own state under the storage: SQLite run history, and the launcher of scheduled runs as Ray jobs."""

import socket
from pathlib import Path

import dagster as dg
import psutil
import yaml

DRIVER_TAG = "recycle/driver"  # host:pid:start time of the process that executes a run of the command line
RETRIES_TAG = "dagster/max_retries"
RAY_DASHBOARD = "http://127.0.0.1:8265"
# Where a run finds code and configuration: the launcher copies these from the daemon. No secrets: Ray shows them.
PASSED_ON = ["RECYCLE_CONFIG", "RECYCLE_OVERRIDES", "RECYCLE_HOME", "PYTHONPATH"]


def open_instance(folder: Path) -> dg.DagsterInstance:
    """The instance whose home is `folder`; written on first use, left as it is afterwards, so that it can be edited."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "dagster.yaml"
    if not settings.exists():
        settings.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return dg.DagsterInstance.from_config(str(folder))


def driver_tag() -> dict[str, str]:
    """Tags of a run in this process: who executes it, so that others can tell whether it still runs; no retries."""
    process = psutil.Process()
    return {DRIVER_TAG: f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}", RETRIES_TAG: "0"}


def reap(instance: dg.DagsterInstance) -> int:
    """Mark runs as failed whose driver on this machine is gone; a driver that was killed leaves its run open."""
    open_runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING]))
    dead = [run for run in open_runs if driver_is_dead(run)]
    for run in dead:
        instance.report_run_failed(run, message="its driver was killed; reported by the next run")
    return len(dead)


def driver_is_dead(run: dg.DagsterRun) -> bool:
    """Whether the run was executed by a process of this machine that is gone; False where that cannot be known."""
    tag = run.tags.get(DRIVER_TAG)
    if tag is None:
        return False
    host, pid, started = tag.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" != started
    except psutil.NoSuchProcess:
        return True


SETTINGS: dict[str, object] = {
    "telemetry": {"enabled": False},
    "run_launcher": {
        "module": "cluster.run_launcher",
        "class": "RayJobLauncher",
        # $RAY_API_SERVER_ADDRESS, where it is set, goes before this address.
        "config": {"ray": {"address": RAY_DASHBOARD, "env_vars": PASSED_ON}},
    },
    # One run at a time: a run owns the storage while it writes.
    "run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"},
    "concurrency": {"runs": {"max_concurrent_runs": 1}},
    "run_monitoring": {"enabled": True, "poll_interval_seconds": 10, "start_timeout_seconds": 900},
    "run_retries": {"enabled": True, "max_retries": 1},
    "code_servers": {"local_startup_timeout": 300},
}
