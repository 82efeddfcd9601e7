"""The table of slips in docs/operations.md: each is typed, and prints what the table says."""

import io
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.lease import lease
from flows.command import command
from flows.recycle_and_train import GRAPH
from flows.refreshes import retry_refresh
from flows.releases import roll_back
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss
from operators.files.atomic import put_file
from tests.flows.flow_runs import write_source

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
ROW = re.compile(r"^\| `(.+?)` \| (\d) \| `(.+)` \|$", re.MULTILINE)
ROWS = [(typed, int(code), line.replace("\\`", "`")) for typed, code, line in ROW.findall(PAGE.read_text())]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """The words of the table that stand for a place."""
    (tmp_path / "a_file").write_text("a list of papers")
    put_file(f"{tmp_path}/home/published/thesis.tex", "years")
    write_source(tmp_path / "data.jsonl", 4)
    (tmp_path / "data").mkdir()
    write_source(tmp_path / "data" / "a.jsonl", 4)
    put_file(f"{tmp_path}/cut_off/config.json", "{}")
    put_file(f"{tmp_path}/cut_off/model.safetensors", "")
    (tmp_path / "busy").mkdir()
    evaluation = Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=1.9))
    for version in ("0123456789abcdef", "v1"):
        ReleaseHistory(f"{tmp_path}/storage").record("released", version, evaluation, ())
    names = ("A_FILE", "HOME", "DATA", "CUT_OFF", "BUSY", "STORAGE", "NOWHERE")
    return {name: f"{tmp_path}/{name.lower()}" for name in names} | {"DELETED": "0123456789abcdef"}


def test_the_table_is_found() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("typed", "code", "line"), ROWS, ids=[typed for typed, _, _ in ROWS])
def test_a_slip_prints_what_the_table_says(
    tmp_path: Path,
    places: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr("flows.preflight.cluster_nodes", list)  # these need no Ray
    monkeypatch.setattr("flows.preflight.exposed_address", lambda: None)
    monkeypatch.setattr("flows.launch.connected", nullcontext)
    typed = typed.replace("run demo", f"run --config configs/demo.yaml storage={tmp_path}/new")
    for word, place in places.items():
        typed = re.sub(rf"\b{word}\b", place, typed)
    err, (first, *others) = io.StringIO(), shlex.split(typed)
    with lease(places["BUSY"]):
        if first == "run":
            assert command(GRAPH, [first, *others]) == code
        else:
            assert {"rollback": roll_back, "retry": retry_refresh}[first](others, err=err) == code
    said = capfd.readouterr().err + err.getvalue()
    pattern = ".*".join(re.escape(part) for part in line.split("..."))
    assert any(re.search(f"^{pattern}", one) for one in said.splitlines()), said
