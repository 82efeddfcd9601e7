"""`make bench` runs every script, even if one fails, and lists those that failed."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run_all

    return run_all


def test_every_script_is_run_or_has_a_reason(run_all) -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert {benchmark.script for benchmark in run_all.BENCHMARKS} | set(run_all.NOT_RUN) == scripts


def test_a_failing_script_is_named_and_the_others_still_run(run_all, monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "good.py").write_text("print('3 rows/s')")
    (tmp_path / "bad.py").write_text("print('before'); raise SystemExit(7)")
    scripts = tuple(run_all.Benchmark(name, (), "nothing") for name in ("bad", "good"))
    monkeypatch.setattr(run_all, "BENCHMARKS", scripts)
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path / "out")])
    assert run_all.main() == 1
    table = capsys.readouterr().out
    assert "FAILED (7)" in table
    assert "3 rows/s" in table
    assert (tmp_path / "out" / "bad.txt").read_text() == "before\n"


def test_an_unknown_name_is_refused_with_the_names_that_exist() -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run_all.py"), "speed"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "no such benchmark: speed; there are reflection" in ended.stderr


def test_every_option_of_the_list_is_known_to_its_script(run_all) -> None:
    for benchmark in run_all.BENCHMARKS:
        script = (BENCHMARKS / f"{benchmark.script}.py").read_text()
        options = [argument for argument in benchmark.arguments if argument.startswith("--")]
        assert [option for option in options if f'"{option}"' not in script] == [], benchmark.script
