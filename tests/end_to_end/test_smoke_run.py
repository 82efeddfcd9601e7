"""The README's command on configs/smoke.yaml, as a stranger runs it, and then again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def run_flow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "flows/recycle_and_train.py", "--config", "configs/smoke.yaml", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": "local", **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.mark.slow
def test_the_command_gives_a_student_and_a_report_and_then_has_nothing_to_do(tmp_path: Path, tiny_model: str) -> None:
    settings = [f"storage={tmp_path}", f"student.model={tiny_model}"]
    first = run_flow(*settings)
    assert first.returncode == 0, first.stderr + (log_of(tmp_path))
    figures = json.loads((tmp_path / "reports" / "smoke.json").read_text())
    assert figures["rows"]["source"] == 32
    assert figures["conservation"]["holds"]
    assert {"calls", "cached_calls", "prompt_tokens", "generated_tokens", "seconds"} <= set(figures["teacher"])
    asked = [stage["teacher"] for stage in figures["stages"] if stage["asset"].endswith("_reflections")]
    used = sum(stage["prompt_tokens"] + stage["generated_tokens"] for stage in asked)
    assert figures["teacher"]["paid_tokens"] == used > 0
    assert figures["train"]["last_loss"] > 0
    assert figures["evaluation"]["held_out_loss"]["student"] > 0
    assert (tmp_path / "reports" / "smoke.html").stat().st_size > 10_000
    assert "Traceback" not in first.stdout + first.stderr

    [student] = (tmp_path / "students").iterdir()
    AutoTokenizer.from_pretrained(student)
    AutoModelForCausalLM.from_pretrained(student, use_safetensors=True)

    ledger = sorted((tmp_path / "ledger").rglob("*.parquet"))
    second = run_flow(*settings)
    assert second.returncode == 0, second.stderr
    assert "everything was up to date: no teacher call, no training" in second.stdout
    assert sorted((tmp_path / "ledger").rglob("*.parquet")) == ledger


@pytest.mark.slow
def test_the_plan_executes_nothing(tmp_path: Path) -> None:
    planned = run_flow("--plan", f"storage={tmp_path}/storage")
    assert planned.returncode == 0, planned.stderr
    assert "raw_instructions          new" in planned.stdout
    assert "30 new calls, 0 from the ledger, 0 over-long" in planned.stdout
    assert not (tmp_path / "storage" / "assets").exists()
    assert not (tmp_path / "storage" / "ledger").exists()


def log_of(storage: Path) -> str:
    return "".join(file.read_text()[-3000:] for file in storage.glob("logs/*.log"))
