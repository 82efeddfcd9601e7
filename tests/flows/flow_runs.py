"""Helpers for tests of whole flows: run a flow, write a source, and read what a run stored and printed."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMOKE = str(Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml")
Flow = Callable[..., tuple[int, str]]  # the type of the fixture `flow`


def flow_in(folder: Path, model: str) -> Flow:
    """A function that runs the flow on a storage in this folder and returns the exit code and the output."""
    from flows.launch import run_flow
    from flows.recycle_and_train import GRAPH

    def run(*arguments: str) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        settings = [f"storage={folder}/storage", f"student.model={model}", "evaluate.judge=false"]
        code = run_flow(GRAPH, ["--config", SMOKE, *settings, "train.num_workers=1", *arguments], (out, err))
        sys.stderr.write(err.getvalue())
        return code, out.getvalue()

    return run


def write_source(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"instruction": f"Name {n} rivers.", "input": "", "output": f"River {n}."} for n in range(start, start + count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def manifest(tmp_path: Path, asset: str, refresh: str = "base") -> dict[str, Any]:
    folder = tmp_path / "storage" / "assets" / asset
    partitioned = folder / f"refresh={refresh}"
    found: dict[str, Any] = json.loads(
        ((partitioned if partitioned.is_dir() else folder) / "manifest.json").read_text()
    )
    return found


def line_of(printed: str, start: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(start))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
