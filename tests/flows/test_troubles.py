"""Troubles are told once in one line; tests/flows/test_schedules.py shows them at the daemon's looks."""

import errno
import json
import sys
from pathlib import Path

import dagster as dg

from cluster.files import StorageError
from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.run import open_run
from flows.troubles import alert_once, words_of_trouble
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
