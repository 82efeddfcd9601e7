"""Looks of the daemon at a storage, for tests: a view, source files, and refreshes that were made or failed."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from flows.config import load_config
from flows.graph import RAW_INSTRUCTIONS
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.schedules import JOB

REPOSITORY = Path(__file__).resolve().parents[2]
PARTITION = "dagster/partition"


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
