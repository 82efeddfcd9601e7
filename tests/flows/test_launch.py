"""Every error that ends a run becomes one line for the user."""

import argparse
import errno
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.files import explained
from cluster.manifest import Manifest
from flows.config import ConfigError, load_config
from flows.launch import _conclude, _log_file, _parse, _selection, run_flow
from flows.preflight import _storage_findings
from flows.recycle_and_train import GRAPH
from flows.run import open_run

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke.yaml"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "storage: the disk of /s/x is full; free space, then run the same command again"),
        (errno.EROFS, "storage: /s/x is read-only; give another by storage=<folder>"),
        (errno.EACCES, "storage: no permission to write /s/x"),
        (errno.ENOENT, "storage: /s/x is not there, or not any more; look whether its disk is mounted"),
        (errno.ENOTDIR, "storage: a part of the path /s/x is a file, not a folder; give another"),
        (errno.EEXIST, "storage: /s/x is a file, not a folder; give another by storage=<folder>"),
        (errno.ESTALE, "storage: the file server of /s/x does not answer as it should; mount it again"),
        (errno.EMFILE, "storage: too many files are open, the last one was /s/x; raise `ulimit -n`"),
        (errno.ENAMETOOLONG, "storage: /s/x is too long for a name; give a shorter storage or key"),
        (errno.EXDEV, "/s/x: invalid cross-device link (EXDEV); check it, then run the same command again"),
    ],
)
def test_an_operating_system_error_of_the_storage_has_a_cure(number: int, words: str) -> None:
    assert str(explained(OSError(number, "no", "/s/x"), "/s")).startswith(words)


def test_an_error_of_no_operating_system_is_for_others_to_explain() -> None:
    assert explained(OSError("Couldn't deserialize thrift"), "/s") is None


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_a_storage_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    (tmp_path / "storage").write_text("a list of papers")
    storage = f"storage={tmp_path}/storage{below}"
    [finding] = _storage_findings(open_run(load_config(SMOKE, [storage]), GRAPH.specs), holds_lease=False)
    assert str(finding) == f"storage: {tmp_path}/storage is a file, not a folder; give another by storage=<folder>"
    assert run_flow(GRAPH, ["--config", str(SMOKE), storage]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is a file, not a folder; give another by storage=<folder>" in line


def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_is_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", "/s/x")

    monkeypatch.setattr("flows.launch._run", fail)
    assert run_flow(GRAPH, ["--config", str(SMOKE), f"storage={tmp_path}/storage"]) == 1
    assert capfd.readouterr().err == (
        "/s/x: invalid cross-device link (EXDEV); check it, then run the same command again\n"
    )
    [log] = (tmp_path / "storage" / "logs").iterdir()
    assert "Traceback" in log.read_text()


def test_an_error_without_a_file_names_the_storage() -> None:
    assert "the disk of /s is full" in str(explained(OSError(errno.ENOSPC, "no"), "/s"))


def select(*argv: str) -> list[str]:
    arguments: argparse.Namespace = _parse(argv)
    return _selection(GRAPH, arguments)


def test_a_selection_is_checked_against_the_graph() -> None:
    assert select() == []
    assert select("--select", "student,report") == ["student", "report"]
    with pytest.raises(ConfigError, match="--select: packs: no such asset; there are raw_instructions"):
        select("--select", "packs")


@pytest.mark.parametrize("key", ["", "..", "../../x", "2026/11/26"])
def test_a_key_that_names_no_refresh_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"--refresh: .* is not a key"):
        select("--refresh", key)


def test_a_negative_number_of_canary_calls_is_refused(tmp_path: Path) -> None:
    err = io.StringIO()
    arguments = ["--config", str(SMOKE), f"storage={tmp_path}", "--plan", "--canary", "-3"]
    assert run_flow(GRAPH, arguments, (io.StringIO(), err)) == 2
    assert err.getvalue() == "--canary: -3: give a number of calls, 1 or more\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--retract", ""], "--retract: name a file below source.path\n"),
        (["--select", ""], "--select: nothing: no such asset; there are raw_instructions, "),
        (["--canary", "3"], "--canary: only with --plan; a run makes all its calls\n"),
    ],
)
def test_an_option_that_cannot_be_meant_starts_no_run_and_writes_nothing(
    tmp_path: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "storage"
    assert run_flow(GRAPH, ["--config", str(SMOKE), f"storage={storage}", *arguments]) == 2
    assert capsys.readouterr().err.startswith(line)
    assert not storage.exists()


def test_plan_and_doctor_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(["--plan", "--doctor"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--plan"], False),
        (["--doctor"], False),
        (["--step", "3"], False),
        ([], True),
        (["--plan", "--canary=2"], True),
    ],
)
def test_commands_that_only_read_leave_nothing_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kept: bool
) -> None:
    storage = tmp_path / "storage"
    run = open_run(load_config(SMOKE, [f"storage={storage}"]), GRAPH.specs)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = _log_file(run, _parse(arguments))
    assert log.is_relative_to(storage / "logs") is kept
    assert log.is_file() is not kept
    assert not storage.exists()


def test_json_lines_of_an_error_and_of_the_end_have_run_and_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECYCLE_LOG_FORMAT", "json")
    out, err = io.StringIO(), io.StringIO()
    assert run_flow(GRAPH, ["--config", f"{tmp_path}/none.yaml", "--refresh", "monday"], (out, err)) == 2
    [error], [end] = ([json.loads(line) for line in stream.getvalue().splitlines()] for stream in (err, out))
    assert "none.yaml" in error["message"]
    assert (end["message"], end["level"], end["exit_code"]) == ("ended", "error", 2)
    assert error["run"] == end["run"] != ""
    assert (error["refresh"], end["refresh"]) == ("monday", "monday")


@pytest.mark.parametrize("current", [True, False])
def test_only_a_report_that_is_current_is_shown_at_the_end(tmp_path: Path, current: bool) -> None:
    run = open_run(load_config(SMOKE, [f"storage={tmp_path}"]), GRAPH.specs)
    folder = tmp_path / "assets" / "report"
    folder.mkdir(parents=True)
    value = {"html": "r.html", "figures": {"conclusion": {"gained": "It gained."}}}
    fingerprint = run.staleness.fingerprint("report") if current else "of an earlier run"
    (folder / "manifest.json").write_text(Manifest(fingerprint=fingerprint, value=value).model_dump_json())
    (folder / "_SUCCESS").touch()
    run.store.made.add(("held_out", "x"))
    result: Any = SimpleNamespace(success=True, get_asset_check_evaluations=list)
    out = io.StringIO()
    assert _conclude(run, result, (out, io.StringIO())) == 0
    assert out.getvalue() == ("It gained.\nreport: r.html\n" if current else "")
