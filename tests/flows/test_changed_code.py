"""Changing a word of a prompt, a parser or one row in 100 repeats only the necessary work, and the plan says why."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PARTS = ("flows", "operators", "cluster", "kernels", "configs", "pyproject.toml")
ROWS = 100
UP_TO = "raw_instructions,instruction_reflections,selected_instructions,response_reflections"


class Copy:
    """A copy of the code that can be edited, and its storage."""

    def __init__(self, folder: Path, student: str) -> None:
        self.folder = folder
        for part in PARTS:
            source = REPOSITORY / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        self.settings = {
            "storage": folder / "storage",
            "source.path": folder / "source.jsonl",
            "source.held_out_fraction": 0,
            "deduplicate.near": "false",
            "student.model": student,
            "select.policy": "none",
        }
        self.write_rows(ROWS)

    def write_rows(self, count: int) -> None:
        rows = [{"instruction": f"Name river number {n} of the world.", "output": f"River {n}."} for n in range(count)]
        (self.folder / "source.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r} is there {text.count(old)} times"
        (self.folder / file).write_text(text.replace(old, new))

    def run(self, *arguments: str) -> str:
        command = [sys.executable, "flows/recycle_and_train.py", "--config", "configs/smoke.yaml"]
        overrides = [f"{key}={value}" for key, value in self.settings.items()]
        ended = subprocess.run(
            [*command, *overrides, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def paid(self, asset: str) -> tuple[int, int]:
        path = self.folder / "storage" / "assets" / asset / "refresh=base" / "manifest.json"
        figures: dict[str, Any] = json.loads(path.read_text())["metrics"]
        return figures["calls"], figures["cached_calls"]


def line_of(printed: str, start: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(start))


@pytest.mark.slow
@pytest.mark.long
def test_each_change_costs_what_depends_on_it(tmp_path: Path, tiny_model: str) -> None:
    copy = Copy(tmp_path / "copy", tiny_model)
    copy.run("--select", UP_TO)
    assert copy.paid("instruction_reflections") == copy.paid("response_reflections") == (ROWS, 0)

    copy.replace("operators/reflect/prompts.py", "correct, complete, to the point.", "correct, complete, and short.")
    plan = copy.run("--plan")
    assert "cached" in line_of(plan, "instruction_reflections")
    assert "stale: code prompt" in line_of(plan, "response_reflections")
    assert f"0 new calls, {ROWS} from the ledger" in line_of(plan, "reflect_instructions")
    assert f"{ROWS} new calls, 0 from the ledger" in line_of(plan, "reflect_responses")
    printed = copy.run("--select", UP_TO)
    assert "made instruction_reflections" not in printed
    assert copy.paid("response_reflections") == (ROWS, 0)

    written, rewritten = "limit is None or len(text) <= limit else", "limit is None or limit >= len(text) else"
    copy.replace("operators/reflect/parse_replies.py", written, rewritten)
    copy.write_rows(ROWS + 1)
    plan = copy.run("--plan")
    assert "parser" in line_of(plan, "instruction_reflections")
    assert "stale: files changed" in line_of(plan, "raw_instructions")
    assert f"1 new calls, {ROWS} from the ledger" in line_of(plan, "reflect_instructions")
    copy.run("--select", UP_TO)
    assert copy.paid("instruction_reflections") == copy.paid("response_reflections") == (1, ROWS)
