"""The flow as its user meets it: the graph, the command line, what is made again and what is not, and the exit codes.

Runs with the scripted teacher and a tiny student, but with the real Ray Data, Ray Train, DeepSpeed and Dagster.
"""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.launch import run_flow
from flows.recycle_and_train import GRAPH

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SMOKE = str(REPOSITORY / "configs" / "smoke.yaml")
TRAINED = ("student", "evaluation", "release", "report")
Flow = Callable[..., tuple[int, str]]

EDGES = {
    "raw_instructions": set(),
    "held_out": {"raw_instructions"},
    "instruction_reflections": {"raw_instructions"},
    "selected_instructions": {"instruction_reflections"},
    "response_reflections": {"selected_instructions"},
    "recycled_instructions": {"response_reflections"},
    "published_dataset": {"recycled_instructions"},
    "packed_sequences": {"recycled_instructions"},
    "student": {"packed_sequences"},
    "evaluation": {"held_out", "student"},
    "release": {"student", "evaluation"},
    "report": {"recycled_instructions", "packed_sequences", "student", "evaluation", "release"},
}


def test_the_graph_has_the_edges_of_the_design() -> None:
    found = {name: {dep.asset_key.to_user_string() for dep in spec.deps} for name, spec in GRAPH.specs.items()}
    assert found == EDGES


def test_the_graph_is_imported_without_torch() -> None:
    """Eight seconds for every `--plan`, every process that Dagster starts and most of those that Ray does."""
    code = "import flows.recycle_and_train, sys; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def flow(tmp_path: Path, tiny_model: str, local_ray: None) -> Flow:
    """Runs the flow on a storage of the test's own; returns the exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        settings = [f"storage={tmp_path}/storage", f"student.model={tiny_model}", "evaluate.judge=false"]
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


@pytest.mark.slow
def test_a_run_then_nothing_then_only_what_changed(flow: Flow, tmp_path: Path) -> None:
    """Up to the packs; training and evaluation follow in tests/end_to_end."""
    select = ("--select", ",".join(name for name in GRAPH.specs if name not in TRAINED))
    source = write_source(tmp_path / "source.jsonl", 20)
    code, printed = flow(f"source.path={source}", *select)
    assert code == 0, printed
    raw = manifest(tmp_path, "raw_instructions")
    held_out = raw["outcomes"].get("dropped:held_out", 0)
    assert raw["rows"] == 20
    assert manifest(tmp_path, "instruction_reflections")["metrics"]["calls"] == 20 - held_out
    published = pd.read_parquet(tmp_path / "storage" / "published" / "parquet")
    assert len(published) == 20 - held_out
    lineage = json.loads((tmp_path / "storage" / "published" / "lineage.json").read_text())
    assert [name for name, _ in lineage["source"]["files"]] == ["source.jsonl"]
    assert sum(lineage["outcomes"].values()) == 20

    code, printed = flow(f"source.path={source}", *select)
    assert code == 0
    assert "everything was up to date: no teacher call, no training" in printed

    code, printed = flow(f"source.path={source}", "pack.max_tokens=128", *select)
    assert code == 0, printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("made ")] == ["packed_sequences:"]

    more = write_source(tmp_path / "source.jsonl", 24)
    code, printed = flow(f"source.path={more}", "--plan")
    assert code == 0
    assert "raw_instructions          stale: files changed" in printed
    code, printed = flow(f"source.path={more}", "--select", "raw_instructions,instruction_reflections")
    assert code == 0, printed
    assert manifest(tmp_path, "instruction_reflections")["metrics"]["calls"] <= 4


@pytest.mark.slow
def test_a_second_refresh_takes_only_new_files_and_new_rows(flow: Flow, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_source(folder / "first.jsonl", 12)
    settings = [f"source.path={folder}", "source.held_out_fraction=0", "--select"]
    reflect = "raw_instructions,instruction_reflections"
    assert flow(*settings, reflect)[0] == 0
    write_source(folder / "second.jsonl", 6, start=9)
    assert flow(*settings, reflect, "--refresh", "second")[0] == 0
    second = manifest(tmp_path, "raw_instructions", "second")
    assert second["outcomes"] == {"": 3, "dropped:seen_in_earlier_refresh": 3}
    assert manifest(tmp_path, "instruction_reflections", "second")["metrics"]["calls"] == 3
    code, printed = flow(*settings, reflect)
    assert code == 0
    assert "everything was up to date" in printed


@pytest.mark.slow
def test_an_earlier_refresh_made_again_loses_no_row_to_a_later_one(flow: Flow, tmp_path: Path) -> None:
    """Each called the other's rows seen, so that ten rows were in neither."""
    folder = tmp_path / "source"
    folder.mkdir()
    settings = [f"source.path={folder}", "source.held_out_fraction=0", "--select", "raw_instructions"]
    write_source(folder / "first.jsonl", 12)
    assert flow(*settings)[0] == 0
    write_source(folder / "second.jsonl", 6, start=9)
    assert flow(*settings, "--refresh", "second")[0] == 0
    assert flow(*settings, "source.max_chars=1000")[0] == 0
    assert manifest(tmp_path, "raw_instructions")["outcomes"] == {"": 12}
    code, printed = flow(*settings, "--plan", "--refresh", "second")
    assert code == 0
    assert "an earlier refresh changed" in line_of(printed, "raw_instructions")


class TestWithoutPayingTwice:
    REFLECT = ("source.held_out_fraction=0", "--select", "raw_instructions,instruction_reflections")

    @pytest.mark.slow
    def test_reparse_reads_again_and_makes_no_call(self, flow: Flow, tmp_path: Path) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, *self.REFLECT)[0] == 0
        code, printed = flow(source, "--reparse", *self.REFLECT)
        assert code == 0
        assert "made instruction_reflections: 4 rows" in printed
        assert manifest(tmp_path, "instruction_reflections")["metrics"]["calls"] == 0

    @pytest.mark.slow
    def test_reparse_of_a_changed_prompt_is_refused(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, *self.REFLECT)[0] == 0
        assert flow(source, "reflect.form=delimited", "--reparse", *self.REFLECT)[0] == 1
        assert "the ledger lacks 4 of 4 replies, and --reparse makes no call" in last_line(capsys)

    def test_a_canary_is_paid_once_and_predicts(self, flow: Flow, tmp_path: Path) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 8)}"
        limits = ("source.held_out_fraction=0", "teacher.batch_rows=1", "reflect.max_tokens=64")
        assert f"and at most {8 * 64} reply tokens" in flow(source, *limits, "--plan")[1]
        code, printed = flow(source, *limits, "--plan", "--canary", "2", "budget.max_tokens=1500")
        assert code == 0
        assert "6 new calls, 2 from the ledger" in printed
        assert "at most" not in printed.split("6 new calls")[1].splitlines()[0]
        assert "will stop at budget.max_tokens: 1500" in printed

    @pytest.mark.slow
    def test_a_budget_stops_the_run_and_a_larger_one_finishes_it(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 8)}"
        limits = ("reflect.max_tokens=64", "teacher.batch_rows=1")
        assert flow(source, *limits, "budget.max_tokens=1500", *self.REFLECT)[0] == 1
        assert "instruction_reflections: reflect_instructions: budget.max_tokens: 1500 is reached" in last_line(capsys)
        assert flow(source, *limits, *self.REFLECT)[0] == 0
        figures = manifest(tmp_path, "instruction_reflections")["metrics"]
        assert figures["cached_calls"] >= 1
        assert figures["calls"] + figures["cached_calls"] == 8


class TestExitCodes:
    def test_a_misspelt_key_is_two_and_one_line(self, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
        code, _ = flow("train.max_stepps=1")
        assert code == 2
        assert "train.max_stepps: no such key" in last_line(capsys)

    def test_a_model_that_does_not_exist_is_two(self, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
        code, _ = flow("teacher.backend=vllm", "teacher.model=/nowhere/model")
        assert code == 2
        assert "teacher.model: no folder '/nowhere/model'" in last_line(capsys)

    def test_an_unknown_asset_is_two(self, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
        assert flow("--select", "packs")[0] == 2
        assert "--select: packs: no such asset; there are raw_instructions" in last_line(capsys)

    def test_a_plan_that_cannot_be_placed_is_two(self, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
        assert flow("train.num_workers=64")[0] == 2
        assert "train.num_workers: train needs 64 workers of 1 CPU at once, the cluster can place 2" in last_line(
            capsys
        )

    def test_scoring_that_cannot_be_placed_is_two_before_the_teacher_is_asked(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert flow("score.gpus_per_actor=1")[0] == 2
        assert "score.actors: score needs 1 actors of 1 CPU and 1 GPU at once" in last_line(capsys)
        assert not (tmp_path / "storage" / "ledger").exists()

    @pytest.mark.parametrize("key", ["", "../../x", "2026/11/26"])
    def test_a_key_that_names_no_refresh_is_two_and_touches_nothing(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
    ) -> None:
        assert flow("--refresh", key)[0] == 2
        assert f"--refresh: {key!r} is no key; give a letter or digit" in last_line(capsys)
        assert not (tmp_path / "storage").exists()

    def test_the_doctor_says_whether_a_run_can_work_and_runs_nothing(self, flow: Flow, tmp_path: Path) -> None:
        assert flow("--doctor") == (0, "this configuration can run\n")
        code, printed = flow("--doctor", "source.path=/nowhere.jsonl", "train.num_workers=64")
        assert code == 2
        assert "refused: source.path: " in printed
        assert "refused: train.num_workers: train needs 64 workers" in printed
        assert not (tmp_path / "storage").exists()

    def test_a_model_that_does_not_fit_into_memory_is_two(
        self, flow: Flow, demo_model: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        teacher = ["teacher.backend=vllm", "teacher.device=cpu", f"teacher.model={demo_model}"]
        assert flow(*teacher, "teacher.cpu_kv_cache_gib=4096")[0] == 2
        assert "teacher.model: needs about 4096.5 GiB, a node has" in last_line(capsys)

    def test_a_source_that_is_not_there_is_two(self, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
        assert flow("source.path=/nowhere.jsonl")[0] == 2
        assert "source.path" in last_line(capsys)

    def test_a_source_that_no_record_of_can_be_used_is_two(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.jsonl").write_text('{"instruction": "", "output": "x"}\nnot json\n')
        assert flow(f"source.path={tmp_path}/bad.jsonl")[0] == 2
        message = last_line(capsys)
        assert "none of the first 2 records can be used: empty_instruction 1, malformed_json 1" in message

    def test_a_source_that_no_row_survives_is_two(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, "source.held_out_fraction=0.999999")[0] == 2
        message = last_line(capsys)
        assert "raw_instructions: no row of" in message
        assert "4 dropped:held_out" in message

    @pytest.mark.slow
    def test_a_row_that_vanished_is_three(self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, "--select", "raw_instructions")[0] == 0
        change_rows(tmp_path, lambda rows: rows.slice(1))
        assert flow(source, "--select", "instruction_reflections")[0] == 3
        assert "instruction_reflections: 3 rows out against 4 read" in last_line(capsys)
        assert not (folder_of(tmp_path, "instruction_reflections") / "_SUCCESS").exists()

    def test_a_fault_that_was_mended_does_not_end_later_runs(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = tmp_path / "source.jsonl"
        bad.write_text('{"instruction": "", "output": "x"}\n')
        assert flow(f"source.path={bad}", "--select", "raw_instructions")[0] == 2
        source = f"source.path={write_source(bad, 4)}"
        assert flow(source, "--select", "raw_instructions")[0] == 0

    @pytest.mark.parametrize("arguments", [["--plan"], ["--select", "raw_instructions"]], ids=["plan", "run"])
    def test_a_broken_manifest_is_one_line_with_its_cure(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, "--select", "raw_instructions")[0] == 0
        (folder_of(tmp_path, "raw_instructions") / "manifest.json").write_text('{"rows"')
        assert flow(source, *arguments)[0] == 1
        assert "manifest.json cannot be read; delete" in last_line(capsys)

    def test_a_flipped_bit_is_one_line_with_its_cure(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, "--select", "raw_instructions")[0] == 0
        file = next(folder_of(tmp_path, "raw_instructions").glob("*.parquet"))
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(bytes(content))
        assert flow(source, "--select", "instruction_reflections")[0] == 1
        assert f"{file} is damaged: its checksum is" in last_line(capsys)

    @pytest.mark.slow
    def test_a_row_that_is_there_twice_in_place_of_another_is_three(
        self, flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
        assert flow(source, "--select", "raw_instructions")[0] == 0
        change_rows(tmp_path, lambda rows: pa.concat_tables([rows.slice(1), rows.slice(rows.num_rows - 1)]))
        assert flow(source, "--select", "instruction_reflections")[0] == 3
        assert "4 rows out against 4 read, and they are not the same rows" in last_line(capsys)


def folder_of(tmp_path: Path, asset: str) -> Path:
    return tmp_path / "storage" / "assets" / asset / "refresh=base"


def change_rows(tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite one file of the raw instructions, and its size in the manifest, as no crash could."""
    folder = tmp_path / "storage" / "assets" / "raw_instructions" / "refresh=base"
    held = json.loads((folder / "manifest.json").read_text())
    file = next(name for name in held["files"] if pq.read_table(folder / name).num_rows)
    pq.write_table(change(pq.read_table(folder / file)), folder / file)
    held["files"][file] = (folder / file).stat().st_size
    held["checksums"] = {}
    (folder / "manifest.json").write_text(json.dumps(held))


def line_of(printed: str, start: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(start))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
