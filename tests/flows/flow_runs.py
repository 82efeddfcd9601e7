"""What the tests of whole flows share: a source to read, and what a run left and printed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Flow = Callable[..., tuple[int, str]]  # what the fixture `flow` is


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
