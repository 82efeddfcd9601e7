"""Dagster's own state under the storage: SQLite run history, and the launcher of scheduled runs as Ray jobs."""

import os
import socket
from pathlib import Path

import dagster as dg
import psutil
import yaml

DRIVER_TAG = "recycle/driver"  # host:pid:start time of the process that executes a run


def open_instance(folder: Path, ray_dashboard: str = "http://127.0.0.1:8265") -> dg.DagsterInstance:
    """The instance whose home is `folder`; written on first use, left as it is afterwards, so that it can be edited."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "dagster.yaml"
    if not settings.exists():
        settings.write_text(yaml.safe_dump(_settings(ray_dashboard), sort_keys=False))
    return dg.DagsterInstance.from_config(str(folder))


def driver_tag() -> dict[str, str]:
    """Identifies this process in its run's tags, so that a later start can tell whether it still lives."""
    process = psutil.Process()
    return {DRIVER_TAG: f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"}


def reap(instance: dg.DagsterInstance) -> int:
    """Mark runs as failed whose driver on this machine is gone; a driver killed hard leaves its run open for ever."""
    open_runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING]))
    dead = [run for run in open_runs if _is_dead(run.tags.get(DRIVER_TAG))]
    for run in dead:
        instance.report_run_failed(run, message="its driver was killed; reported by the next run")
    return len(dead)


def _is_dead(tag: str | None) -> bool:
    if tag is None:
        return False
    host, pid, started = tag.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" != started
    except psutil.NoSuchProcess:
        return True


def _settings(ray_dashboard: str) -> dict[str, object]:
    return {
        "telemetry": {"enabled": False},
        "run_launcher": {
            "module": "dagster_ray",
            "class": "RayRunLauncher",
            "config": {"ray": {"address": os.environ.get("RAY_API_SERVER_ADDRESS", ray_dashboard)}},
        },
        "run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"},
        # One run at a time: a run owns the storage while it writes.
        "concurrency": {"runs": {"max_concurrent_runs": 1}},
        "run_monitoring": {"enabled": True, "poll_interval_seconds": 10},
        "run_retries": {"enabled": True, "max_retries": 1},
    }
