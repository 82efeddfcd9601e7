"""Dagster's own state under the storage: SQLite run history, and the launcher of scheduled runs as Ray jobs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import yaml
from sqlalchemy.exc import DBAPIError

from cluster.files import StorageError
from cluster.lease import is_leased
from operators.files.places import PASSED_TO_WORKERS

DRIVER_TAG = "recycle/driver"  # tag of a run that the command line executes, under the storage's lease
STORAGE_TAG = "recycle/storage"  # tag that names the storage of a run
RETRIES_TAG = "dagster/max_retries"
POSTGRES_VARIABLE = "DAGSTER_PG_URL"  # every process needs it: DRIVER user:password@host:port/database
DRIVER = (
    "postgresql+psycopg2://"  # for postgresql://, SQLAlchemy 2.1 takes a driver that dagster-postgres does not know
)
MOST_CHARS = 200  # of a Dagster error, which may list all possible keys
RAY_DASHBOARD = "http://127.0.0.1:8265"
# Variables that tell a run where code and configuration are; the launcher copies them from the daemon. None of them may
# be a secret, because Ray shows them.
PASSED_ON = ["RECYCLE_CONFIG", "RECYCLE_OVERRIDES", "RECYCLE_HOME", "PYTHONPATH", *PASSED_TO_WORKERS]


def open_instance(folder: Path) -> dg.DagsterInstance:
    """The instance whose home is `folder`. The first call writes its settings; later calls keep them, also if edited.

    Raises:
        StorageError: $DAGSTER_PG_URL names no usable driver; or settings or history cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "dagster.yaml"
    if not settings.exists():
        settings.write_text(yaml.safe_dump(SETTINGS | _history_in_postgres(), sort_keys=False))
    try:
        instance = dg.DagsterInstance.from_config(str(folder))
        instance.get_runs(limit=1)
        instance.all_asset_keys()
    except Exception as error:  # noqa: BLE001 - whatever Dagster, SQLAlchemy and a database's driver raise
        raise StorageError(_unusable(folder, settings, error)) from None
    return instance


@contextmanager
def history(folder: Path) -> Iterator[dg.DagsterInstance]:
    """The instance of `open_instance` while a run goes on, which writes to it all the time.

    Raises:
        StorageError: as there; or the history could not be written, on a full disk for example.
    """
    with open_instance(folder) as instance:
        try:
            yield instance
        except DBAPIError as error:
            if "disk is full" not in str(error.orig):
                raise StorageError(_unusable(folder, folder / "dagster.yaml", error)) from None
            raise StorageError(
                f"storage: the disk of {folder} is full; free space, then run the same command again"
            ) from None


def _unusable(folder: Path, settings: Path, error: Exception) -> str:
    """One line with the cure; the text of a PostgreSQL error may contain the address, so it is left out."""
    if isinstance(error, dg.DagsterInvalidConfigError | yaml.YAMLError | UnicodeError):
        why = " ".join(str(error).split())[:MOST_CHARS]
        return f"{settings} cannot be used ({why}...); fix it, or delete {settings} and run again: it is written anew"
    if "postgres:" in settings.read_text():
        return f"the database of ${POSTGRES_VARIABLE} does not answer as it should ({type(error).__name__}); look at it"
    why = " ".join(str(error).split())[:MOST_CHARS]
    if "is locked" in why:
        return f"the history of runs in {folder} is locked by another process; run the same command again"
    return f"the history of runs cannot be read ({why}); delete {folder} and run again: nothing else is in it"


def _history_in_postgres() -> dict[str, object]:
    """Settings for PostgreSQL if $DAGSTER_PG_URL is set; only the variable's name is stored.

    SQLite, the default, is not safe in a folder that hosts share.
    """
    url = os.environ.get(POSTGRES_VARIABLE)
    if not url:
        return {}
    if not url.startswith(DRIVER):
        raise StorageError(f"${POSTGRES_VARIABLE}: begin it with {DRIVER}, the driver that Dagster works with")
    return {"storage": {"postgres": {"postgres_url": {"env": POSTGRES_VARIABLE}}}}


def driver_tags(storage: str) -> dict[str, str]:
    """Tags of a run of the command line: it is alive as long as it holds the storage's lease; Dagster never retries."""
    return {DRIVER_TAG: "command line", STORAGE_TAG: storage, RETRIES_TAG: "0"}


def reap(instance: dg.DagsterInstance, storage: str) -> int:
    """Mark the runs of the command line that are still open as failed; the caller holds the storage's lease.

    The process that executed such a run held the lease. It does not hold it any more, so it has ended, on whatever
    machine it was; host names, process ids and clocks are not needed.
    """
    open_runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING]))
    dead = [run for run in open_runs if DRIVER_TAG in run.tags and run.tags.get(STORAGE_TAG, storage) == storage]
    for run in dead:
        instance.report_run_failed(run, message="its driver was killed; reported by the next run")
    return len(dead)


def is_alive(run: dg.DagsterRun, otherwise: str) -> bool:
    """Whether a process holds the lease of the storage of a run, as it does as long as the run works.

    Args:
        run: any run.
        otherwise: the storage, if the run has no tag that names it.
    """
    return is_leased(run.tags.get(STORAGE_TAG, otherwise))


SETTINGS: dict[str, object] = {
    "telemetry": {"enabled": False},
    "run_launcher": {
        "module": "cluster.run_launcher",
        "class": "RayJobLauncher",
        # $RAY_API_SERVER_ADDRESS, if set, overrides this address.
        "config": {"ray": {"address": RAY_DASHBOARD, "env_vars": PASSED_ON}},
    },
    # One run at a time: a run owns the storage while it writes.
    "run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"},
    "concurrency": {"runs": {"max_concurrent_runs": 1}},
    "run_monitoring": {"enabled": True, "poll_interval_seconds": 10, "start_timeout_seconds": 900},
    # `flows.retries` retries refreshes, with back-off; this is for runs that a person launches in the web page.
    "run_retries": {"enabled": True, "max_retries": 1},
    "code_servers": {"local_startup_timeout": 300},
}
