"""The exit codes of a run, each with a line with the reason: 2 for unusable input, 3 for a broken invariant."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.flows.flow_runs import Flow, flow_in, last_line, write_source


@pytest.fixture(scope="module")
def read_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, local_ray: None) -> Path:
    """A source of four rows beside a storage that holds them as raw instructions."""
    folder = tmp_path_factory.mktemp("read")
    source = write_source(folder / "source.jsonl", 4)
    assert flow_in(folder, tiny_model)(f"source.path={source}", "--select", "raw_instructions")[0] == 0
    return folder


@pytest.fixture
def source(read_once: Path, tmp_path: Path) -> str:
    """The override for a source, with a storage for this test that already has its raw instructions."""
    shutil.copytree(read_once, tmp_path, dirs_exist_ok=True)
    return f"source.path={tmp_path / 'source.jsonl'}"


def test_a_misspelt_key_is_two_and_one_line(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = flow("train.max_stepps=1")
    assert code == 2
    assert "train.max_stepps: no such key" in last_line(capsys)


def test_a_model_that_does_not_exist_is_two(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = flow("teacher.backend=vllm", "teacher.model=/nowhere/model")
    assert code == 2
    assert "teacher.model: no folder '/nowhere/model'" in last_line(capsys)


def test_an_unknown_asset_is_two(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert flow("--select", "packs")[0] == 2
    assert "--select: packs: no such asset; there are raw_instructions" in last_line(capsys)


def test_a_plan_that_cannot_be_placed_is_two(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert flow("train.num_workers=64")[0] == 2
    assert "train.num_workers: train needs 64 workers of 1 CPU at once, the cluster can place 2" in last_line(capsys)


def test_scoring_that_cannot_be_placed_is_two_before_the_teacher_is_asked(
    flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flow("score.gpus_per_actor=1")[0] == 2
    assert "score.actors: score needs 1 actors of 1 CPU and 1 GPU at once" in last_line(capsys)
    assert not (tmp_path / "storage" / "ledger").exists()


@pytest.mark.parametrize("key", ["", "../../x", "2026/11/26"])
def test_an_invalid_refresh_key_is_two_and_touches_nothing(
    flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert flow("--refresh", key)[0] == 2
    assert f"--refresh: {key!r} is not a key; give a letter or digit" in last_line(capsys)
    assert not (tmp_path / "storage").exists()


def test_the_doctor_says_whether_a_run_can_work_and_runs_nothing(flow: Flow, tmp_path: Path) -> None:
    assert flow("--doctor") == (0, "this configuration can run\n")
    code, printed = flow("--doctor", "source.path=/nowhere.jsonl", "train.num_workers=64")
    assert code == 2
    assert "refused: source.path: " in printed
    assert "refused: train.num_workers: train needs 64 workers" in printed
    assert not (tmp_path / "storage").exists()


def test_a_model_that_does_not_fit_into_memory_is_two(
    flow: Flow, demo_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["teacher.backend=vllm", "teacher.device=cpu", f"teacher.model={demo_model}"]
    assert flow(*teacher, "teacher.cpu_kv_cache_gib=4096")[0] == 2
    assert "teacher.model: needs about 4096.5 GiB, a node has" in last_line(capsys)


def test_a_source_that_is_not_there_is_two(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert flow("source.path=/nowhere.jsonl")[0] == 2
    assert "source.path" in last_line(capsys)


def test_a_source_without_a_usable_record_is_two(
    flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "", "output": "x"}\nnot json\n')
    assert flow(f"source.path={tmp_path}/bad.jsonl")[0] == 2
    message = last_line(capsys)
    assert "none of the first 2 records can be used: empty_instruction 1 (there is nothing to recycle; " in message
    assert "malformed_json 1 (write one JSON object per line" in message


def test_a_source_that_no_row_survives_is_two(flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"source.path={write_source(tmp_path / 'source.jsonl', 4)}"
    assert flow(source, "source.held_out_fraction=0.999999")[0] == 2
    message = last_line(capsys)
    assert "raw_instructions: no row of" in message
    assert "4 dropped:held_out" in message


@pytest.mark.slow
def test_a_row_that_vanished_is_three(
    flow: Flow, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_rows(tmp_path, lambda rows: rows.slice(1))
    assert flow(source, "--select", "instruction_reflections")[0] == 3
    assert "instruction_reflections: 3 rows out against 4 read" in last_line(capsys)
    assert not (folder_of(tmp_path, "instruction_reflections") / "_SUCCESS").exists()


def test_a_fault_that_was_repaired_does_not_end_later_runs(
    flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "source.jsonl"
    bad.write_text('{"instruction": "", "output": "x"}\n')
    assert flow(f"source.path={bad}", "--select", "raw_instructions")[0] == 2
    source = f"source.path={write_source(bad, 4)}"
    assert flow(source, "--select", "raw_instructions")[0] == 0


@pytest.mark.parametrize("arguments", [["--plan"], ["--select", "raw_instructions"]], ids=["plan", "run"])
def test_a_broken_manifest_is_one_line_with_its_cure(
    flow: Flow, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (folder_of(tmp_path, "raw_instructions") / "manifest.json").write_text('{"rows"')
    assert flow(source, *arguments)[0] == 1
    assert "manifest.json cannot be read; delete" in last_line(capsys)


def test_a_flipped_bit_is_one_line_with_its_cure(
    flow: Flow, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(folder_of(tmp_path, "raw_instructions").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(bytes(content))
    assert flow(source, "--select", "instruction_reflections")[0] == 1
    assert f"{file} is damaged: its checksum is" in last_line(capsys)


@pytest.mark.slow
def test_a_row_that_is_there_twice_in_place_of_another_is_three(
    flow: Flow, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_rows(tmp_path, lambda rows: pa.concat_tables([rows.slice(1), rows.slice(rows.num_rows - 1)]))
    assert flow(source, "--select", "instruction_reflections")[0] == 3
    assert "4 rows out against 4 read, and they are not the same rows" in last_line(capsys)


def folder_of(tmp_path: Path, asset: str) -> Path:
    return tmp_path / "storage" / "assets" / asset / "refresh=base"


def change_rows(tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite one file of the raw instructions, and its size in the manifest, which no crash could do."""
    folder = tmp_path / "storage" / "assets" / "raw_instructions" / "refresh=base"
    held = json.loads((folder / "manifest.json").read_text())
    file = next(name for name in held["files"] if pq.read_table(folder / name).num_rows)
    pq.write_table(change(pq.read_table(folder / file)), folder / file)
    held["files"][file] = (folder / file).stat().st_size
    held["checksums"] = {}
    del held["seal"]
    (folder / "manifest.json").write_text(json.dumps(held))
