"""Whether a run is alive is decided by the storage's lease and by Ray, not by host name, process id or clock."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import dagster as dg
import pytest
import yaml
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_ray import RayRunLauncher

from cluster import dagster_home, run_launcher
from cluster.dagster_home import DRIVER_TAG, STORAGE_TAG, driver_tags, open_instance, reap
from cluster.lease import lease
from cluster.run_launcher import RayJobLauncher

STARTED = dg.DagsterRunStatus.STARTED


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def instance(storage: Path) -> Any:
    with open_instance(storage / "dagster") as instance:
        yield instance


def started(instance: dg.DagsterInstance, tags: dict[str, str]) -> dg.DagsterRun:
    run = dg.DagsterRun(job_name="job", tags=tags, status=STARTED)
    instance.add_run(run)
    return run


def health(instance: dg.DagsterInstance, run: dg.DagsterRun) -> WorkerStatus:
    return instance.run_launcher.check_run_worker_health(run).status


def test_a_run_of_the_command_line_lives_as_long_as_the_lease_is_held(
    storage: Path, instance: dg.DagsterInstance
) -> None:
    """Its process may be on any host, so the processes of this machine do not matter."""
    run = started(instance, {**driver_tags(str(storage)), DRIVER_TAG: "another-host:1:0"})
    assert isinstance(instance.run_launcher, RayJobLauncher)
    with lease(str(storage)):
        assert health(instance, run) == WorkerStatus.RUNNING
    assert health(instance, run) == WorkerStatus.FAILED


def test_reaping_under_the_lease_ends_every_open_run_of_the_command_line_and_no_other(
    storage: Path, instance: dg.DagsterInstance
) -> None:
    of_other_host = started(instance, {DRIVER_TAG: "another-host:1:0"})
    of_other_storage = started(instance, {**driver_tags("/elsewhere")})
    of_the_daemon = started(instance, {STORAGE_TAG: str(storage)})
    with lease(str(storage)):
        assert reap(instance, str(storage)) == 1
    found = {run.run_id: run.status for run in instance.get_runs()}
    assert found[of_other_host.run_id] == dg.DagsterRunStatus.FAILURE
    assert found[of_other_storage.run_id] == found[of_the_daemon.run_id] == STARTED


def test_postgres_is_configured_by_the_name_of_a_variable_and_its_password_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_PG_URL", "postgresql+psycopg2://dagster:secret@db/dagster")
    monkeypatch.setattr(dagster_home.dg.DagsterInstance, "from_config", MagicMock())
    open_instance(tmp_path / "home")
    text = (tmp_path / "home" / "dagster.yaml").read_text()
    assert "secret" not in text
    settings = yaml.safe_load(text)
    assert settings["storage"] == {"postgres": {"postgres_url": {"env": "DAGSTER_PG_URL"}}}


@pytest.mark.parametrize("silent", ["unknown", "unreachable"])
def test_a_run_that_holds_the_lease_is_kept_if_ray_does_not_answer(
    storage: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    def ask(*_: object) -> CheckRunHealthResult:
        if silent == "unreachable":
            raise ConnectionError("no route to Ray")
        return CheckRunHealthResult(WorkerStatus.UNKNOWN)

    monkeypatch.setattr(RayRunLauncher, "check_run_worker_health", ask)
    run = started(instance, {STORAGE_TAG: str(storage)})
    with lease(str(storage)):
        assert health(instance, run) == WorkerStatus.RUNNING
    assert health(instance, run) == WorkerStatus.RUNNING, "it may be starting"
    monkeypatch.setattr(run_launcher, "PATIENCE_S", 0.0)
    assert health(instance, run) == WorkerStatus.FAILED


def test_the_state_that_ray_reports_decides(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = CheckRunHealthResult(WorkerStatus.FAILED, "Ray job failed")
    monkeypatch.setattr(RayRunLauncher, "check_run_worker_health", lambda *_: dead)
    assert health(instance, started(instance, {})) == WorkerStatus.FAILED
