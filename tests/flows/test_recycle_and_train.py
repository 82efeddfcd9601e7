"""The flow from the user's side: the graph, the command line, and which assets are made again.

The teacher is scripted and the student is tiny, but Ray Data, Ray Train, DeepSpeed and Dagster are real.
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from flows.config import load_config
from flows.recycle_and_train import GRAPH, packed_sequences, student
from flows.run import Run, open_run
from tests.flows.flow_runs import SMOKE, Flow, last_line, line_of, manifest, write_source
from tests.flows.train_results import a_result

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TRAINED = ("student", "evaluation", "release", "report")

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


def test_packs_and_training_get_the_student_s_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jinja").write_text("a template")
    settings = [f"student.chat_template={tmp_path / 'mine.jinja'}", f"storage={tmp_path}", f"student.model={tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    run, given = open_run(load_config(Path(SMOKE), settings), GRAPH.specs), []
    monkeypatch.setattr(Run, "student_version", lambda _: "v1")
    monkeypatch.setattr("flows.recycle_and_train.note_checksums", lambda _: None)
    monkeypatch.setattr("flows.recycle_and_train.pack", lambda *arguments: given.append(arguments[-1]))
    monkeypatch.setattr("operators.train.train.train", lambda *arguments: given.append(arguments[-1]) or a_result({}))
    for asset in (packed_sequences, student):
        asset.op.compute_fn.decorated_fn(None, run).build()
    assert given == ["a template"] * 2


@pytest.mark.slow
def test_the_plan_executes_nothing(flow: Flow, tmp_path: Path) -> None:
    code, printed = flow("--plan")
    assert code == 0, printed
    assert "raw_instructions          new" in printed
    assert "41 new calls, 0 from the ledger, 0 over-long" in printed
    assert not (tmp_path / "storage" / "assets").exists()
    assert not (tmp_path / "storage" / "ledger").exists()


@pytest.mark.slow
def test_a_run_then_only_what_changed(flow: Flow, tmp_path: Path) -> None:
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
    """Earlier, each of the two called the other's rows seen, so ten rows were in neither."""
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

    @pytest.mark.slow
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
