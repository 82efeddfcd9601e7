"""The sensor and the schedule request new data once, give a reason if they request nothing, and wait for each other."""

import errno
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cluster.lease import lease
from flows.config import load_config
from flows.graph import RAW_INSTRUCTIONS
from flows.recycle_and_train import GRAPH
from flows.retries import BUSY_TAG
from flows.run import Run, open_run
from flows.schedules import (
    JOB,
    _requested,
    new_data_schedule,
    new_data_sensor,
    refresh_key,
    run_resource,
    wanted_runs,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PARTITION = "dagster/partition"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def instance() -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def look(tmp_path: Path, *overrides: str) -> Run:
    """A new view of the storage, as each tick has."""
    paths = [f"storage={tmp_path / 'storage'}", f"source.path={tmp_path / 'source'}"]
    config = load_config(REPOSITORY / "configs/smoke.yaml", [*paths, *overrides])
    return open_run(config, GRAPH.specs, config.schedule.settle_seconds)


def drop(folder: Path, name: str, text: str = "Say hello.", age_s: float = 3600) -> Path:
    """A source file that was last changed `age_s` ago."""
    file = folder / name
    file.write_text(json.dumps({"instruction": text, "input": "", "output": "Hello."}) + "\n")
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def finish(run: Run, asset: str, refresh: str, **manifest: Any) -> None:
    """Leave an asset as a finished run leaves it."""
    folder = Path(run.config.storage) / "assets" / asset / f"refresh={refresh}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": "0", **manifest}))
    (folder / "_SUCCESS").touch()


def take(run: Run, refresh: str, active: int = 1) -> None:
    """Let a refresh take every file that is there."""
    files = [[file.name, file.identity] for file in run.staleness.files.files_of(refresh)]
    finish(run, RAW_INSTRUCTIONS, refresh, made_from={"files": files}, outcomes={"": active})


def finished(tmp_path: Path, key: str) -> Run:
    """A view of a storage in which a refresh has been recycled and its request is done."""
    finish(look(tmp_path), "recycled_instructions", key)
    look(tmp_path).requests.remove(key)
    return look(tmp_path)


def fail(instance: dg.DagsterInstance, key: str) -> None:
    run = dg.DagsterRun(job_name=JOB, tags={PARTITION: key}, status=dg.DagsterRunStatus.STARTED)
    instance.add_run(run)
    instance.report_run_failed(run)


def keys(found: list[dg.RunRequest] | dg.SkipReason) -> list[str | None]:
    assert isinstance(found, list), found
    return [request.partition_key for request in found]


def reason(found: list[dg.RunRequest] | dg.SkipReason) -> str:
    assert isinstance(found, dg.SkipReason), found
    return str(found.skip_message)


def test_new_files_give_one_run_whose_name_depends_only_on_them(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    first, again = wanted_runs(instance, look(tmp_path)), wanted_runs(instance, look(tmp_path))
    assert keys(first) == keys(again) == [first[0].run_key]  # type: ignore[index]
    drop(source, "b.jsonl", "Say goodbye.")
    assert keys(wanted_runs(instance, look(tmp_path))) != keys(first)


def test_a_storage_that_is_not_there_is_not_filled_again(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(source, "a.jsonl")
    mounted = "schedule.existing_storage=true"
    assert "is no storage yet" in reason(wanted_runs(instance, look(tmp_path, mounted)))
    assert not (tmp_path / "storage").exists()
    monkeypatch.setenv("RECYCLE_CONFIG", str(REPOSITORY / "configs/smoke.yaml"))
    monkeypatch.setenv("RECYCLE_OVERRIDES", f"storage={tmp_path / 'storage'} {mounted}")
    launched = {"run": run_resource(GRAPH.specs)}
    with pytest.raises(dg.DagsterResourceFunctionError) as failed, dg.build_resources(launched):
        pytest.fail("it ran")
    assert "is no storage yet" in str(failed.value.__cause__)
    assert not (tmp_path / "storage").exists()
    with lease(str(tmp_path / "storage")):
        pass
    assert keys(wanted_runs(instance, look(tmp_path, mounted)))


def test_files_that_a_refresh_has_taken_are_not_asked_for_again(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    take(look(tmp_path), "base")
    finish(look(tmp_path), "recycled_instructions", "base")
    assert "no file that no refresh has taken" in reason(wanted_runs(instance, look(tmp_path)))
    drop(source, "b.jsonl", "Say goodbye.")
    new = look(tmp_path).staleness.files.files_of(None)
    assert [file.name for file in new] == ["b.jsonl"]
    assert keys(wanted_runs(instance, look(tmp_path))) == [refresh_key(new)]


def test_a_folder_a_month_asks_for_each_file_once(tmp_path: Path, source: Path, instance: dg.DagsterInstance) -> None:
    """Case of users: the name of a file depended on its neighbours, and a new month asked for all months again."""
    for number, name in enumerate(("2026-11/a.jsonl", "2026-12/b.jsonl", "c.jsonl")):
        (source / name).parent.mkdir(exist_ok=True)
        drop(source, name, name)
        [key] = keys(wanted_runs(instance, look(tmp_path)))
        assert [file.name for file in look(tmp_path).staleness.files.files_of(key)] == [name]
        take(look(tmp_path), str(key), number + 1)
        assert isinstance(wanted_runs(instance, finished(tmp_path, str(key))), dg.SkipReason)


def test_a_rewritten_file_is_new(tmp_path: Path, source: Path, instance: dg.DagsterInstance) -> None:
    drop(source, "a.jsonl")
    take(look(tmp_path), "base")
    finish(look(tmp_path), "recycled_instructions", "base")
    drop(source, "a.jsonl", "Say goodbye.", age_s=1800)
    assert len(keys(wanted_runs(instance, look(tmp_path)))) == 1


def test_a_file_that_just_changed_waits(tmp_path: Path, source: Path, instance: dg.DagsterInstance) -> None:
    drop(source, "half.jsonl", age_s=1)
    settle = "schedule.settle_seconds=600"
    assert "older than 600 s" in reason(wanted_runs(instance, look(tmp_path, settle)))
    whole = drop(source, "whole.jsonl")
    assert [file.path for file in look(tmp_path, settle).staleness.files.files_of(None)] == [str(whole)]


def test_an_empty_source_is_a_reason_not_an_error(tmp_path: Path, source: Path, instance: dg.DagsterInstance) -> None:
    assert str(source) in reason(wanted_runs(instance, look(tmp_path)))


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_nothing_is_asked_for_while_a_run_is_active(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance, status: dg.DagsterRunStatus
) -> None:
    drop(source, "a.jsonl")
    add_run(instance, {PARTITION: "base"}, status)
    assert f"of refresh base is {status.value}" in reason(wanted_runs(instance, look(tmp_path)))


def test_a_failed_refresh_waits_and_new_files_go_on_without_it(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    [key] = keys(wanted_runs(instance, look(tmp_path, "schedule.retry_seconds=600")))
    fail(instance, str(key))
    assert f"refresh {key} failed 1 of 8 times" in reason(wanted_runs(instance, look(tmp_path)))
    drop(source, "b.jsonl", "Say goodbye.")
    [other] = wanted_runs(instance, look(tmp_path))  # type: ignore[misc]
    assert [file.name for file in look(tmp_path).staleness.files.files_of(other.partition_key)] == ["b.jsonl"]
    assert keys(wanted_runs(instance, look(tmp_path, "schedule.retry_seconds=0"))) == [key, other.partition_key]


def test_nothing_is_asked_for_while_the_command_line_holds_the_storage(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    with lease(str(tmp_path / "storage")):
        assert "the command line is writing" in reason(wanted_runs(instance, look(tmp_path)))
    assert len(keys(wanted_runs(instance, look(tmp_path)))) == 1


def test_a_run_that_finds_the_storage_busy_does_not_count_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECYCLE_CONFIG", str(REPOSITORY / "configs/smoke.yaml"))
    monkeypatch.setenv("RECYCLE_OVERRIDES", f"storage={tmp_path / 'storage'}")

    @dg.op(required_resource_keys={"run"})
    def use() -> None: ...

    @dg.job(resource_defs={"run": run_resource(GRAPH.specs)})
    def job() -> None:
        use()

    with dg.DagsterInstance.ephemeral() as instance, lease(str(tmp_path / "storage")):
        ended = job.execute_in_process(instance=instance, raise_on_error=False)
        assert not ended.success
        assert BUSY_TAG in instance.get_run_by_id(ended.run_id).tags  # type: ignore[union-attr]


def test_a_file_that_may_not_be_read_is_not_taken_and_stops_no_other(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(source, "mine.jsonl")
    forbidden = drop(source, "theirs.jsonl", "Say goodbye.")
    allowed = Path.open

    def open_(path: Path, *arguments: Any, **options: Any) -> Any:  # root may read everything
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_)
        [key] = keys(wanted_runs(instance, look(tmp_path)))
        assert look(tmp_path).staleness.files.unreadable() == ["theirs.jsonl"]
        assert [file.name for file in look(tmp_path).staleness.files.files_of(key)] == ["mine.jsonl"]
        take(look(tmp_path), str(key))
        instance_says = reason(wanted_runs(instance, finished(tmp_path, str(key))))
        assert "cannot be read: theirs.jsonl" in instance_says
    assert [file.name for file in look(tmp_path).staleness.files.files_of(None)] == ["theirs.jsonl"]


def test_a_refresh_that_broke_off_is_finished_before_the_student_is_trained_without_it(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    take(look(tmp_path), "broken")
    take(look(tmp_path), "nothing-usable", active=0)
    assert isinstance(wanted_runs(instance, look(tmp_path)), dg.SkipReason)
    drop(source, "b.jsonl", "Say goodbye.")
    new = refresh_key(look(tmp_path).staleness.files.files_of(None))
    assert keys(wanted_runs(instance, look(tmp_path))) == ["broken", new]


def test_a_source_out_of_reach_stops_no_refresh_whose_rows_are_stored_and_is_told_once(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(source, "a.jsonl")
    take(look(tmp_path), "broken")
    drop(source, "b.jsonl", "Say goodbye.")
    [broken, waiting] = keys(wanted_runs(instance, look(tmp_path)))
    told = alerts(tmp_path)

    def out_of_reach(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(source))

    with monkeypatch.context() as patched:
        patched.setattr("flows.source_versions.list_source_files", out_of_reach)
        for _ in range(3):
            assert keys(wanted_runs(instance, look(tmp_path, *told.overrides))) == [broken]
        [alert] = told.read()
        assert f"refresh {waiting} waits" in alert["text"]
        assert str(source) in alert["text"]
    assert keys(wanted_runs(instance, look(tmp_path, *told.overrides))) == [broken, waiting]
    assert len(told.read()) == 1
    with monkeypatch.context() as patched:
        patched.setattr("flows.source_versions.list_source_files", out_of_reach)
        wanted_runs(instance, look(tmp_path, *told.overrides))
    assert len(told.read()) == 2, "it was well in between"


@pytest.mark.parametrize("damaged", ["raw_instructions", "recycled_instructions"])
def test_a_damaged_manifest_is_a_reason_and_one_alert(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance, damaged: str
) -> None:
    drop(source, "a.jsonl")
    take(look(tmp_path), "base")
    finish(look(tmp_path), "recycled_instructions", "base")
    file = tmp_path / "storage" / "assets" / damaged / "refresh=base" / "manifest.json"
    file.write_text("{")
    drop(source, "b.jsonl", "Say goodbye.")
    told = alerts(tmp_path)
    for _ in range(2):
        found = wanted_runs(instance, look(tmp_path, *told.overrides))
        if damaged == "raw_instructions":  # nobody knows which files it took
            assert f"{file} cannot be read" in reason(found)
        else:
            assert len(keys(found)) == 1, "other refreshes go on"
    [alert] = told.read()
    assert f"{file} cannot be read; delete" in alert["text"]


def test_a_damaged_request_stops_no_other_and_its_files_are_asked_for_again(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    [key] = keys(wanted_runs(instance, look(tmp_path)))
    file = tmp_path / "storage" / "refreshes" / f"{key}.json"
    file.write_text(file.read_text().replace("a.jsonl", "c.jsonl"))
    drop(source, "b.jsonl", "Say goodbye.")
    told = alerts(tmp_path)
    [other] = keys(wanted_runs(instance, look(tmp_path, *told.overrides)))
    assert [one.name for one in look(tmp_path).staleness.files.files_of(other)] == ["a.jsonl", "b.jsonl"]
    [alert] = told.read()
    assert f"{file} holds no request; delete it" in alert["text"]


def test_an_alert_that_is_not_delivered_is_sent_again(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    (tmp_path / "storage" / "refreshes").mkdir(parents=True)
    (tmp_path / "storage" / "refreshes" / "x.json").write_text("{")
    wanted_runs(instance, look(tmp_path, 'schedule.alert_command=["false"]'))
    told = alerts(tmp_path)
    wanted_runs(instance, look(tmp_path, *told.overrides))
    assert len(told.read()) == 1


def test_a_requested_refresh_takes_its_files_however_young_they_seem(
    tmp_path: Path, source: Path, instance: dg.DagsterInstance
) -> None:
    drop(source, "a.jsonl")
    [key] = keys(wanted_runs(instance, look(tmp_path)))
    drop(source, "a.jsonl", age_s=-3600)  # the clock was set back since
    drop(source, "b.jsonl", "Say goodbye.", age_s=-3600)
    settle = "schedule.settle_seconds=600"
    launched = dg.DagsterRun(job_name=JOB, tags={PARTITION: str(key)})
    run = _requested(look(tmp_path, settle), launched)
    assert [file.name for file in run.staleness.files.files_of(key)] == ["a.jsonl"]
    other = _requested(look(tmp_path, settle), dg.DagsterRun(job_name=JOB, tags={PARTITION: "other"}))
    assert other.staleness.files.files_of("other") == []


@dataclass
class Alerts:
    """The messages that the alert command got, and the overrides that name the command."""

    file: Path
    overrides: list[str]

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


def alerts(tmp_path: Path) -> Alerts:
    file = tmp_path / "alerts"
    command = [sys.executable, "-c", f"import sys; open({str(file)!r}, 'a').write(sys.stdin.read() + chr(10))"]
    return Alerts(file, [f"schedule.alert_command={json.dumps(command)}", "schedule.alert_url_env=NOT_SET_IN_TESTS"])


def test_sensor_and_schedule_ask_for_the_same_refresh(tmp_path: Path, source: Path) -> None:
    drop(source, "a.jsonl")
    config = look(tmp_path).config
    sensor, schedule = new_data_sensor(config, GRAPH), new_data_schedule(config, GRAPH)
    with dg.instance_for_test() as instance:
        seen = sensor(dg.build_sensor_context(instance))
        assert isinstance(seen, dg.SensorResult)
        [by_sensor] = seen.run_requests or []
        assert seen.dynamic_partitions_requests[0].partition_keys == [by_sensor.partition_key]
        [by_schedule] = schedule(dg.build_schedule_context(instance))
        assert instance.get_dynamic_partitions("refresh") == [by_schedule.partition_key]
    assert (by_schedule.partition_key, by_schedule.run_key) == (by_sensor.partition_key, by_sensor.run_key)


def test_both_are_off_unless_the_configuration_says_otherwise(tmp_path: Path, source: Path) -> None:
    off, on = look(tmp_path).config, look(tmp_path, "schedule.active=true").config
    assert new_data_sensor(off, GRAPH).default_status == dg.DefaultSensorStatus.STOPPED
    assert new_data_sensor(on, GRAPH).default_status == dg.DefaultSensorStatus.RUNNING
    assert new_data_schedule(on, GRAPH).default_status == dg.DefaultScheduleStatus.RUNNING


def add_run(instance: dg.DagsterInstance, tags: dict[str, str], status: dg.DagsterRunStatus) -> None:
    instance.add_run(dg.DagsterRun(job_name=JOB, tags=tags, status=status))
