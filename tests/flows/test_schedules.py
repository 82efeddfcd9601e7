"""The sensor and the schedule request new data once, give a reason if they request nothing, and wait for each other."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cluster.lease import lease
from flows.recycle_and_train import GRAPH
from flows.remake import assets_by_refresh
from flows.retries import BUSY_TAG
from flows.schedules import (
    JOB,
    _requested,
    new_data_schedule,
    new_data_sensor,
    refresh_key,
    run_resource,
    wanted_runs,
)
from tests.flows.daemon_looks import PARTITION, REPOSITORY, drop, fail, finish, finished, keys, look, reason, take


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
    wanted = wanted_runs(instance, look(tmp_path))
    assert keys(wanted) == ["broken", new]
    assert isinstance(wanted, list)
    first, last = (request.asset_selection for request in wanted)
    assert last is None, "everything: one training after both"
    assert {key.to_user_string() for key in first or ()} == set(assets_by_refresh(look(tmp_path))[0])


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
