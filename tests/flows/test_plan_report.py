"""The `--plan` report: the state of each asset and why, what the run needs, and whether it would be refused."""

import io
from pathlib import Path

import pytest

from cluster.manifest import Manifest, fingerprint_of
from flows import plan_report
from flows.config import load_config
from flows.graph import RAW_INSTRUCTIONS
from flows.plan_report import print_plan, total_lines
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.teacher_work import ABOUT, AT_MOST, Reach, Work
from operators.stage import Finding
from operators.teacher.budget import Tokens
from tests.flows.flow_runs import SMOKE


@pytest.fixture
def run(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on a storage of its own, seen from a cluster of four CPUs."""
    monkeypatch.setattr(plan_report, "cluster_nodes", lambda: [{"CPU": 4.0}])
    settings = [f"storage={tmp_path}/storage", f"source.path={tmp_path}/source", f"student.model={tiny_model}"]
    return open_run(load_config(Path(SMOKE), settings), GRAPH.specs)


def plan_of(run: Run, *findings: Finding) -> tuple[int, list[str]]:
    out = io.StringIO()
    code = print_plan(run, "base", [Finding("source.path", "is empty"), *findings], out)
    return code, [line.strip() for line in out.getvalue().splitlines()]


def test_a_plan_that_is_refused_says_why_after_the_assets_and_what_they_need(run: Run) -> None:
    code, lines = plan_of(run, Finding("cluster", "is slow", fatal=False))
    assert code == 2
    assert lines[0].startswith("plan of smoke, refresh base, storage ")
    assert [line.split() for line in lines[1 : 1 + len(GRAPH.specs)]] == [[asset, "new"] for asset in GRAPH.specs]
    assert "train                     asks for 2 CPU (2 workers) of 4 CPU, 0 GPU" in lines
    assert any(line.endswith("GiB of activations") for line in lines)
    assert lines[-2:] == ["refused: source.path: is empty", "warning: cluster: is slow"]


def test_a_finished_asset_is_cached_or_stale_for_a_reason(run: Run, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    for changes in ({}, {"code": "0"}):
        folder = Path(run.store.folder(RAW_INSTRUCTIONS, "base"))
        folder.mkdir(parents=True, exist_ok=True)
        made_from = run.staleness.describe(RAW_INSTRUCTIONS, "base") | changes
        manifest = Manifest(fingerprint=fingerprint_of(made_from), made_from=made_from, rows=7, outcomes={"": 7})
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        (folder / "_SUCCESS").touch()
        [state] = [line.split(maxsplit=1)[1] for line in plan_of(run)[1] if line.startswith(RAW_INSTRUCTIONS)]
        assert state.startswith("stale: code" if changes else "cached")
        assert state.endswith("7 rows")


@pytest.mark.parametrize(
    ("reaches", "said"),
    [(("", ""), "12 new calls"), (("", AT_MOST), "at most 12 new calls"), ((ABOUT, AT_MOST), "about 12 new calls")],
)
def test_the_number_of_all_calls_is_as_exact_as_the_least_exact_of_them(
    reaches: tuple[Reach, Reach], said: str
) -> None:
    works = [Work("a", 4, tokens=Tokens(40, 8), reach=reaches[0]), Work("b", 8, tokens=Tokens(2, 1), reach=reaches[1])]
    line, *causes = total_lines(works, ", cost 1.00")
    assert line.split(maxsplit=3)[3] == f"{said}; about 42 prompt and at most 9 reply tokens, cost 1.00"
    assert [cause.split(":")[0].strip() for cause in causes] == [
        reach.strip() for reach in (AT_MOST, ABOUT) if reach in reaches
    ]
