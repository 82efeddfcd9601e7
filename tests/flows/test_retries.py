"""A failed refresh is tried again after growing waits and given up at the limit with one alert; `retry` revives it."""

import io
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cluster.manifest import Manifest
from flows.config import load_config
from flows.graph import PARTITION_TAG
from flows.recycle_and_train import GRAPH
from flows.refresh_requests import Request
from flows.refreshes import retry_refresh, show_refreshes
from flows.retries import BUSY_TAG, decide
from flows.run import Run, open_run
from flows.schedules import JOB

REPOSITORY = Path(__file__).resolve().parents[2]
FAILURE, SUCCESS, CANCELED = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED
KEY = "2026-11-26-0a"


@pytest.fixture
def alerts(tmp_path: Path) -> Path:
    """The file to which the alert command appends its messages."""
    return tmp_path / "alerts"


@pytest.fixture
def run(tmp_path: Path, alerts: Path) -> Run:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jsonl").write_text(json.dumps({"instruction": "Say hello.", "output": "Hello."}) + "\n")
    command = [sys.executable, "-c", f"import sys; open({str(alerts)!r}, 'a').write(sys.stdin.read() + chr(10))"]
    overrides = {
        "storage": tmp_path / "storage",
        "source.path": tmp_path / "source",
        "schedule.settle_seconds": 0,
        "schedule.max_attempts": 3,
        "schedule.retry_seconds": 60,
        "schedule.alert_command": json.dumps(command),
        "schedule.alert_url_env": "NOT_SET_IN_TESTS",
    }
    config = load_config(REPOSITORY / "configs/smoke.yaml", [f"{key}={value}" for key, value in overrides.items()])
    run = open_run(config, GRAPH.specs)
    files = tuple((file.name, file.identity) for file in run.staleness.files.files_of(None))
    run.requests.put(Request(key=KEY, files=files))
    return run


def end(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, ago_s: float = 0, **tags: str) -> str:
    """Add a run of the refresh that ended `ago_s` seconds ago."""
    run = dg.DagsterRun(job_name=JOB, tags={PARTITION_TAG: KEY, **tags}, status=dg.DagsterRunStatus.STARTED)
    instance.add_run(run)
    kinds = {FAILURE: "PIPELINE_FAILURE", SUCCESS: "PIPELINE_SUCCESS", CANCELED: "PIPELINE_CANCELED"}
    event = dg.DagsterEvent(kinds[status], JOB, message="the cause")
    ended = datetime.now(UTC) - timedelta(seconds=ago_s)
    instance.run_storage.handle_run_event(run.run_id, event, ended)
    return run.run_id


def keys(run: Run, instance: dg.DagsterInstance) -> list[str | None]:
    return [request.run_key for request in decide(instance, run).due]


def test_a_new_request_is_due_and_keeps_dagster_from_retrying(run: Run, instance: dg.DagsterInstance) -> None:
    [request] = decide(instance, run).due
    assert (request.run_key, request.partition_key) == (KEY, KEY)
    assert request.tags["dagster/max_retries"] == "0"


@pytest.mark.parametrize(("failures", "wait_s"), [(1, 60), (2, 120)])
def test_each_failure_doubles_the_wait(run: Run, instance: dg.DagsterInstance, failures: int, wait_s: int) -> None:
    for _ in range(failures - 1):
        end(instance, FAILURE, 9999)
    end(instance, FAILURE, wait_s - 30)
    decided = decide(instance, run)
    assert decided.due == []
    assert [line.rpartition(", ")[0] for line in decided.waiting] == [f"refresh {KEY} failed {failures} of 3 times"]
    instance.wipe()
    for _ in range(failures):
        end(instance, FAILURE, wait_s + 5)
    assert keys(run, instance) == [f"{KEY}#{failures + 1}"]


def test_a_clock_that_was_set_back_does_not_stop_retries(
    run: Run, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(instance, FAILURE, -86_400)
    seconds = 1000.0
    monkeypatch.setattr("flows.first_seen.time.monotonic", lambda: seconds)
    [line] = decide(instance, run).waiting
    assert line.endswith("next attempt in 60 s")
    seconds += 61
    assert keys(run, instance) == [f"{KEY}#2"]


def test_a_busy_storage_does_not_count_as_an_attempt(run: Run, instance: dg.DagsterInstance) -> None:
    for _ in range(5):
        end(instance, FAILURE, **{BUSY_TAG: "yes"})
    assert keys(run, instance) == [f"{KEY}#6"]


def test_at_the_limit_it_is_given_up_with_one_alert_and_its_files_stay_set_aside(
    run: Run, instance: dg.DagsterInstance, alerts: Path
) -> None:
    for _ in range(3):
        end(instance, FAILURE)
    for _ in range(2):
        decided = decide(instance, run)
        assert decided.due == decided.waiting == []
        assert f"refresh {KEY} was given up after 3 attempts" in decided.given_up[0]
    [told] = map(json.loads, alerts.read_text().splitlines())
    assert (told["refresh"], told["attempts"], told["files"]) == (KEY, 3, ["a.jsonl"])
    assert run.staleness.files.files_of(None) == []
    assert [file.name for file in run.staleness.files.files_of(KEY)] == ["a.jsonl"]


def test_a_run_that_a_person_cancelled_is_not_started_again(run: Run, instance: dg.DagsterInstance) -> None:
    end(instance, CANCELED)
    assert "a person cancelled it" in decide(instance, run).given_up[0]


def test_a_success_ends_the_request(run: Run, instance: dg.DagsterInstance) -> None:
    end(instance, FAILURE)
    end(instance, SUCCESS)
    assert decide(instance, run).due == []
    assert run.requests.all() == []


def test_a_request_whose_files_are_gone_before_anyone_took_them_is_forgotten(
    run: Run, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    (tmp_path / "source/a.jsonl").write_text(json.dumps({"instruction": "Say bye.", "output": "Bye."}) + "\n")
    fresh = open_run(run.config, GRAPH.specs)
    assert decide(instance, fresh).due == []
    assert fresh.requests.all() == []
    assert [file.name for file in fresh.staleness.files.files_of(None)] == ["a.jsonl"]


def test_an_alert_that_fails_is_logged_and_tried_again(run: Run, instance: dg.DagsterInstance) -> None:
    schedule = run.config.schedule.model_copy(update={"alert_command": ("/no/such/program",)})
    broken = open_run(run.config.model_copy(update={"schedule": schedule}), GRAPH.specs)
    end(instance, CANCELED)
    assert (
        "the alert was not delivered: schedule.alert_command: /no/such/program" in decide(instance, broken).given_up[0]
    )
    assert "not delivered" not in decide(instance, run).given_up[0]
    assert run.requests.all()[0].given_up.alerted  # type: ignore[union-attr]


def test_retry_lets_it_run_again_as_if_it_had_never_failed(run: Run, instance: dg.DagsterInstance) -> None:
    for _ in range(3):
        end(instance, FAILURE)
    decide(instance, run)
    out, err = io.StringIO(), io.StringIO()
    assert show_refreshes([run.config.storage], out, err) == 1
    assert "GIVEN UP" in out.getvalue()
    assert f"recycle-and-train retry {run.config.storage} {KEY}" in err.getvalue()
    assert retry_refresh([run.config.storage, KEY], out, err) == 0
    assert keys(run, instance) == [f"{KEY}#4"]
    end(instance, FAILURE)
    assert "failed 1 of 3 times" in decide(instance, run).waiting[0]
    assert show_refreshes([run.config.storage], out, err) == 0


def test_a_run_in_progress_does_not_count_as_a_failed_attempt(
    run: Run, instance: dg.DagsterInstance, alerts: Path
) -> None:
    for _ in range(2):
        end(instance, FAILURE, 9999)
    # Requested by the schedule after the sensor had found no active run.
    instance.add_run(dg.DagsterRun(job_name=JOB, tags={PARTITION_TAG: KEY}, status=dg.DagsterRunStatus.STARTED))
    decided = decide(instance, run)
    assert (decided.due, decided.given_up) == ([], [])
    assert decided.waiting == [f"refresh {KEY} is STARTED"]
    assert not alerts.exists()


def test_a_retry_while_the_alert_goes_out_is_kept(
    run: Run, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        end(instance, FAILURE)

    def a_person_retries(*_: Any) -> list[str]:
        assert retry_refresh([run.config.storage, KEY], io.StringIO()) == 0
        return ["the webhook cannot be reached"]

    monkeypatch.setattr("flows.retries.send_alert", a_person_retries)
    assert decide(instance, run).given_up == []
    assert keys(run, instance) == [f"{KEY}#4"]


def test_a_request_is_forgotten_when_the_source_has_no_file_left(
    run: Run, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    (tmp_path / "source/a.jsonl").unlink()
    fresh = open_run(run.config, GRAPH.specs)
    assert decide(instance, fresh).due == []
    assert fresh.requests.all() == []


def test_a_successful_run_of_some_assets_leaves_the_refresh_asked_for(run: Run, instance: dg.DagsterInstance) -> None:
    folder = Path(run.store.folder("raw_instructions", KEY))
    folder.mkdir(parents=True)
    manifest = Manifest(order=1, fingerprint="0", made_from={"files": []}, outcomes={"": 1})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()
    end(instance, SUCCESS)  # `--select raw_instructions`
    assert keys(run, instance) == [f"{KEY}#2"]
    assert [request.key for request in run.requests.all()] == [KEY]
