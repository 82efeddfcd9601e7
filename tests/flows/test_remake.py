"""`--stale` makes stale refreshes again in the recorded order; only `--retract FILE` removes stored rows."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.config import load_config
from flows.launch import run_flow
from flows.recycle_and_train import GRAPH
from flows.run import open_run

SMOKE = str(Path(__file__).resolve().parents[2] / "configs/smoke.yaml")
RAW = ("--select", "raw_instructions")


@pytest.fixture
def flow(tmp_path: Path, local_ray: None) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        out = io.StringIO()
        settings = [f"storage={tmp_path}/storage", f"source.path={tmp_path}/source", "source.held_out_fraction=0"]
        return run_flow(GRAPH, ["--config", SMOKE, *settings, *arguments], (out, out)), out.getvalue()

    return run


def drop(tmp_path: Path, name: str, *texts: str) -> Path:
    file = tmp_path / "source" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"instruction": text, "output": f"{text}!"}) + "\n" for text in texts))
    return file


def kept(tmp_path: Path, refresh: str = "base") -> dict[str, int]:
    run = open_run(load_config(Path(SMOKE), [f"storage={tmp_path}/storage"]), GRAPH.specs)
    manifest = run.store.manifest("raw_instructions", refresh)
    assert manifest is not None
    return manifest.outcomes


@pytest.mark.slow
def test_only_a_retraction_takes_stored_rows_out(flow: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    gone = drop(tmp_path, "a.jsonl", "Name a river.", "Name a lake in Asia.", "Count to four.")
    drop(tmp_path, "b.jsonl", "Count to four.", "Sing a song about rain.")
    assert flow(*RAW)[0] == 0
    assert kept(tmp_path) == {"": 4, "dropped:duplicate": 1}
    gone.unlink()
    drop(tmp_path, "b.jsonl", "Sing a song about rain.", "What is the capital of Peru?")
    code, printed = flow("source.max_chars=5000", *RAW)
    assert code == 0, printed
    assert "a.jsonl, b.jsonl of refresh base are gone or changed: the rows that were read from them stay" in printed
    assert kept(tmp_path) == {"": 5, "dropped:duplicate": 1}
    assert flow("source.max_chars=5000", "--retract", "c.jsonl")[0] == 2
    with pytest.MonkeyPatch.context() as broken:  # an interrupted retraction is finished by the same command
        broken.setattr("flows.launch._materialise", lambda *_, **__: 1)
        assert flow("source.max_chars=5000", "--retract", "a.jsonl")[0] == 1
    code, printed = flow("source.max_chars=5000", "--retract", "a.jsonl")
    assert code == 0, printed
    assert "retract a.jsonl: refresh base holds 3 of its rows (3 recycled)" in printed
    assert kept(tmp_path) == {"": 3}, "its copy of a row took the row's place: two files held it"
    code, printed = flow("--stale", "--plan", "source.max_chars=6000")
    assert code == 0
    assert "stale: refresh base: raw_instructions, held_out, " in printed


@pytest.mark.slow
@pytest.mark.long
def test_stale_refreshes_are_made_again_in_their_order_and_then_one_student(
    flow: Callable[..., tuple[int, str]], tmp_path: Path, tiny_model: str
) -> None:
    """Only the raw instructions exist at first, and they are stale; nothing that a refresh lacks is left out."""
    small = [f"student.model={tiny_model}", "source.held_out_fraction=0.3", "train.num_workers=1", "train.max_steps=1"]
    small += ["evaluate.judge=false", "evaluate.num_samples=1", "evaluate.max_new_tokens=2"]
    for name in ("b", "a"):  # not in the order of their names
        drop(tmp_path, f"{name}.jsonl", *(f"Name {number} rivers of {name}." for number in range(5)))
        assert flow(*small, *RAW, "--refresh", name)[0] == 0
    code, printed = flow(*small, "source.max_chars=6000", "--stale")
    assert code == 0, printed
    made = re.findall(r"^made (\w+)", printed, re.MULTILINE)
    assert made.count("student") == made.count("published_dataset") == 1, printed
    run = open_run(load_config(Path(SMOKE), [f"storage={tmp_path}/storage"]), GRAPH.specs)
    ended = {
        (asset, key): (tmp_path / f"storage/assets/{asset}/refresh={key}/_SUCCESS").stat().st_mtime
        for asset in ("raw_instructions", "recycled_instructions")
        for key in "ab"
    }
    assert ended["recycled_instructions", "b"] < ended["raw_instructions", "a"]
    assert run.store.refreshes("recycled_instructions") == ["b", "a"]
    code, printed = flow(*small, "source.max_chars=6000", "--stale", "--plan")
    assert code == 0
    assert printed.startswith("nothing is stale\n")


@pytest.mark.slow
def test_rows_that_are_taken_out_leave_the_file_that_refreshes_share(
    flow: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.storage.MOST_LOOSE", 1)
    for name in ("a", "b", "c"):
        drop(tmp_path, f"{name}.jsonl", f"Name the river {name}.", f"Sing of {name}.")
        assert flow(*RAW, "--refresh", name)[0] == 0
    assert [kept(tmp_path, name) for name in "abc"] == [{"": 2}] * 3
    assert texts_in_bundles(tmp_path) == {f"Name the river {name}." for name in "ab"} | {"Sing of a.", "Sing of b."}
    code, printed = flow("--retract", "a.jsonl")
    assert code == 0, printed
    assert kept(tmp_path, "a") == {}
    assert not {text for text in texts_in_bundles(tmp_path) if text.endswith("a.")}
    assert [kept(tmp_path, name) for name in "bc"] == [{"": 2}] * 2


def texts_in_bundles(tmp_path: Path) -> set[str]:
    files = (tmp_path / "storage/assets/raw_instructions/bundles").glob("*.parquet")
    return {text for file in files for text in pq.read_table(file)["instruction"].to_pylist()}


@pytest.mark.parametrize("with_", [["--plan"], ["--stale"], [*RAW]])
def test_a_retraction_is_a_run_of_its_own(tmp_path: Path, with_: list[str]) -> None:
    out = io.StringIO()
    settings = ["--config", SMOKE, f"storage={tmp_path}"]
    assert run_flow(GRAPH, [*settings, "--retract", "a.jsonl", *with_], (out, out)) == 2
    assert out.getvalue() == "--retract: not together with --plan, --doctor, --step, --select or --stale\n"
