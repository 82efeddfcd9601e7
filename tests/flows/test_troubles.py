"""Troubles are told once in one line, and stop only what needs what is damaged."""

import errno
import json
import sys
from pathlib import Path

import dagster as dg
import pytest

from cluster.files import StorageError
from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.run import open_run
from flows.schedules import wanted_runs
from flows.troubles import alert_once, words_of_trouble
from tests.flows.daemon_looks import alerts, drop, finish, keys, look, reason, take
from tests.flows.flow_runs import SMOKE


def test_an_error_is_one_line_without_credentials() -> None:
    assert words_of_trouble(StorageError("a: b\nc"), "/s") == "a: b c"
    assert "/s/a" in words_of_trouble(OSError(errno.EIO, "no", "/s/a"), "/s")
    assert "PASSWORD" not in words_of_trouble(OSError("s3://KEYID:PASSWORD@bucket/a is away"), "/s")


def test_other_request_ids_of_a_store_are_no_other_trouble(tmp_path: Path) -> None:
    file = tmp_path / "alerts"
    command = [sys.executable, "-c", f"open({str(file)!r}, 'a').write('x')"]
    run = open_run(
        load_config(Path(SMOKE), [f"storage={tmp_path}/s", f"schedule.alert_command={json.dumps(command)}"]),
        GRAPH.specs,
    )
    with dg.DagsterInstance.ephemeral() as instance:
        alert_once(instance, run, [])
        for told in ("RequestId: 1A2B3C4D5E6F7A8B", "RequestId: 9A9B9C9D9E9F9A9B", "another"):
            alert_once(instance, run, [f"the store is away ({told})"])
    assert file.read_text() == "xx"


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
