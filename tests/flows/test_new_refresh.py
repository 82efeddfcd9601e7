"""`--refresh new` makes new files a refresh of their own, continues unfinished ones, and ends if there is nothing."""

import io
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.config import ConfigError, load_config
from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.launch import run_flow
from flows.new_refresh import new_refreshes
from flows.recycle_and_train import GRAPH
from flows.refresh_requests import GivenUp, Request
from flows.run import Run, open_run

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke.yaml"


def look(tmp_path: Path) -> Run:
    (tmp_path / "source").mkdir(exist_ok=True)
    return open_run(load_config(SMOKE, [f"storage={tmp_path}/storage", f"source.path={tmp_path}/source"]), GRAPH.specs)


def drop(tmp_path: Path, name: str, age_s: float = 3600) -> Path:
    file = tmp_path / "source" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"instruction": name, "output": name}) + "\n")
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def found(tmp_path: Path, *, writes: bool = True) -> tuple[list[str], str]:
    out = io.StringIO()
    return new_refreshes(look(tmp_path), out, writes=writes), out.getvalue()


def finish(tmp_path: Path, asset: str, refresh: str) -> None:
    """Leave an asset as a finished run leaves it."""
    run = look(tmp_path)
    files = [[file.name, file.identity] for file in run.staleness.files.files_of(refresh)]
    folder = Path(run.store.folder(asset, refresh))
    folder.mkdir(parents=True)
    manifest = {"fingerprint": "0", "made_from": {"files": files}, "outcomes": {"": 1}, "order": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()


def test_new_files_are_one_refresh_until_they_are_recycled(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl")
    assert found(tmp_path, writes=False) == found(tmp_path, writes=False)
    [planned], _ = found(tmp_path, writes=False)
    assert look(tmp_path).requests.all() == [], "a look asks for nothing"
    assert found(tmp_path) == ([planned], "")
    drop(tmp_path, "b.jsonl")  # the first run failed; in the meantime another file has come
    both, _ = found(tmp_path)
    assert planned in both
    assert len(both) == 2
    for asset in (RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS):
        finish(tmp_path, asset, planned)
    look(tmp_path).requests.remove(planned)  # as a run does at its end
    [other] = set(both) - {planned}
    assert found(tmp_path) == ([other], "")


def test_a_refresh_that_was_broken_off_is_continued_without_new_files(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl")
    finish(tmp_path, RAW_INSTRUCTIONS, "base")
    assert found(tmp_path) == (["base"], "")
    finish(tmp_path, RECYCLED_INSTRUCTIONS, "base")
    keys, said = found(tmp_path)
    assert keys == []
    assert said.startswith("nothing to do: source.path: ")


def two_unfinished(tmp_path: Path) -> list[str]:
    drop(tmp_path, "a.jsonl")
    found(tmp_path)
    drop(tmp_path, "b.jsonl")
    keys, _ = found(tmp_path)
    return keys


def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a run prints that finds no fault, on no cluster."""
    for name, value in {"connected": nullcontext, "preflight": lambda *_, **__: []}.items():
        monkeypatch.setattr(f"flows.launch.{name}", value)
    out = io.StringIO()
    places = [f"storage={tmp_path}/storage", f"source.path={tmp_path}/source"]
    run_flow(GRAPH, ["--config", str(SMOKE), *places, "--refresh", "new", *arguments], (out, out))
    return out.getvalue()


def test_several_refreshes_are_made_one_by_one_and_then_one_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, made = two_unfinished(tmp_path), []

    def make(graph: Any, run: Run, instance: Any, refresh: str, selected: Sequence[str]) -> Any:
        made.append((refresh, "student" in selected, "raw_instructions" in selected))
        return SimpleNamespace(success=True, get_asset_check_evaluations=list)

    monkeypatch.setattr("flows.launch._make", make)
    launched(tmp_path, monkeypatch)
    assert made == [*((key, False, True) for key in keys), (keys[-1], True, False)]


def test_a_plan_shows_every_refresh_and_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, planned = two_unfinished(tmp_path), []

    def plan(run: Run, refresh: str, findings: Any, out: Any, *, canary: int) -> int:
        planned.append((refresh, canary))
        return 0

    monkeypatch.setattr("flows.plan_report.print_plan", plan)
    launched(tmp_path, monkeypatch, "--plan", "--canary", "3")
    assert planned == [(keys[0], 0), (keys[1], 3)]
    drop(tmp_path, "c.jsonl")
    asked_for = look(tmp_path).requests.all()
    launched(tmp_path, monkeypatch, "--plan", "--canary", "3")
    assert look(tmp_path).requests.all() == asked_for


def test_a_file_that_may_be_half_copied_waits(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", age_s=0)
    assert found(tmp_path)[0] == []


def test_a_request_whose_file_is_gone_is_forgotten_and_one_that_was_given_up_is_named(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl").unlink()
    drop(tmp_path, "b.jsonl")
    run = look(tmp_path)
    [(name, identity)] = [(file.name, file.identity) for file in run.staleness.files.there()]
    run.requests.put(Request(key="gone", files=(("a.jsonl", "0"),)))
    dead = GivenUp(at="", attempts=3, reason="the disk is full")
    run.requests.put(Request(key="dead", files=((name, identity),), given_up=dead))
    keys, said = found(tmp_path)
    assert keys == []
    assert "warning: refresh dead was given up after 3 attempts: the disk is full" in said
    assert [request.key for request in look(tmp_path).requests.all()] == ["dead"]


def test_a_source_that_never_had_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.path: "):
        found(tmp_path)
    drop(tmp_path, "a.jsonl")
    for asset in (RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS):
        finish(tmp_path, asset, "base")
    (tmp_path / "source/a.jsonl").unlink()
    keys, said = found(tmp_path)
    assert keys == []
    assert said.startswith("nothing to do: ")


@pytest.mark.parametrize("option", [["--stale"], ["--retract", "a.jsonl"]])
def test_options_that_find_refreshes_themselves_are_refused(option: list[str], tmp_path: Path) -> None:
    out = io.StringIO()
    arguments = ["--config", str(SMOKE), f"storage={tmp_path}", "--refresh", "new", *option]
    assert run_flow(GRAPH, arguments, (out, out)) == 2
    assert out.getvalue().startswith("--refresh new: not together with --retract or --stale")
