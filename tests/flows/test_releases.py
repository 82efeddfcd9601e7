"""`releases` and `rollback` on a storage, and the students that a new one is compared with."""

import io
import shutil
from pathlib import Path

import pytest

from cluster.lease import lease
from cluster.manifest import Manifest
from flows.config import evaluate_config, load_config
from flows.recycle_and_train import GRAPH
from flows.releases import models_of, rivals, roll_back, show_releases
from flows.run import open_run
from flows.student_files import note_checksums
from operators.columns import HELD_OUT
from operators.evaluate.config import TrainedAttention
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import BEST, RELEASED, Evaluation, HeldOutLoss
from operators.files.atomic import put_file
from tests.flows.train_results import a_result

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke.yaml"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """v1 and v2 were released, v3 was refused, and v1 is the best released student."""
    history = ReleaseHistory(str(tmp_path))
    for version, event, student in (("v1", "released", 1.7), ("v2", "released", 1.8), ("v3", "refused", 1.9)):
        loss = HeldOutLoss(base=2.0, student=student, num_tokens=10, num_rows=12)
        evaluation = Evaluation(held_out_loss=loss, rows=f"{tmp_path}/{version}.parquet")
        history.record(event, version, evaluation, (f"because of {version}",))  # type: ignore[arg-type]
        for name in ("manifest.json", "config.json", "model.safetensors"):
            put_file(f"{tmp_path}/students/{version}/{name}", version)
    return str(tmp_path)


def test_the_history_is_printed_and_the_released_student_marked(storage: str) -> None:
    out = io.StringIO()
    assert show_releases([storage], out) == 0
    lines = out.getvalue().splitlines()
    assert [line[:7].split() for line in lines[::2]][:3] == [["1"], ["*", "2"], ["3"]]
    assert "held-out loss 2.0000 -> 1.7000" in lines[0]
    assert lines[5].strip() == "because of v3"
    assert lines[-1] == "released: v2"


def test_the_page_shows_every_decision_and_refresh_as_lines_and_numbers(storage: str) -> None:
    for number, key in enumerate(("2026-11-25", "<b>x</b>"[3:4]), 1):
        for asset, outcomes in (("raw_instructions", {"": 8, HELD_OUT: 2}), ("recycled_instructions", {"both": 7})):
            manifest = Manifest(order=number, fingerprint="0", rows=12, outcomes=outcomes)
            folder = Path(storage, "assets", asset, f"refresh={key}")
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(manifest.model_dump_json())
            (folder / "_SUCCESS").touch()
    page, out = Path(storage) / "history.html", io.StringIO()
    assert show_releases([storage, "--html", str(page)], out) == 0
    text = page.read_text()
    assert all(version in text for version in ("v1", "v2", "v3", "2026-11-25"))
    assert "Held-out loss of the student" in text
    assert "Recycled rows of all refreshes" in text
    assert '<td class="n">12</td><td class="n">10</td><td class="n">7</td><td class="n">2</td>' in text
    assert "<script" not in text


def test_a_storage_without_releases_says_so(tmp_path: Path) -> None:
    out = io.StringIO()
    assert show_releases([str(tmp_path)], out) == 0
    assert out.getvalue() == "released: nothing yet\n"


@pytest.mark.parametrize(("name", "message"), [("no_such", "no such folder"), ("s3://bucket/runs/", "ends with a sl")])
def test_a_storage_that_is_not_there_is_one_line_and_is_not_created(tmp_path: Path, name: str, message: str) -> None:
    storage = name if "://" in name else str(tmp_path / name)
    out, err = io.StringIO(), io.StringIO()
    assert show_releases([storage], out, err) == 2
    assert roll_back([storage, "v1"], out, err) == 2
    assert [message in line for line in err.getvalue().splitlines()] == [True, True]
    assert not (tmp_path / name).exists()


def test_a_broken_pointer_is_one_line(storage: str) -> None:
    (Path(storage) / "released.json").write_text("{}")
    err = io.StringIO()
    assert show_releases([storage], io.StringIO(), err) == 2
    assert "holds no release record" in err.getvalue()


def test_a_rollback_is_one_command_and_is_recorded(storage: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    assert roll_back([storage, "v1"], out, err) == 0
    assert "released: v1, in place of v2" in out.getvalue()
    history = ReleaseHistory(storage)
    assert [decision.event for decision in history.decisions()] == ["released", "released", "refused", "rolled_back"]
    assert roll_back([storage, "v3"], out, err) == 2
    assert "v3 was never released; released were: v1, v2" in err.getvalue()


@pytest.mark.parametrize("gone", ["manifest.json", "config.json", "model.safetensors"])
def test_a_student_whose_weights_were_deleted_is_not_released_again(storage: str, gone: str) -> None:
    (Path(storage) / "students" / "v1" / gone).unlink()
    err = io.StringIO()
    assert roll_back([storage, "v1"], io.StringIO(), err) == 2
    assert "students/v1 is not there, or only partly" in err.getvalue()
    assert ReleaseHistory(storage).current().version == "v2"  # type: ignore[union-attr]


def test_a_student_with_a_flipped_bit_is_not_released_again(storage: str) -> None:
    note_checksums(f"{storage}/students/v1")
    (Path(storage) / "students" / "v1" / "model.safetensors").write_text("w1")
    err = io.StringIO()
    assert roll_back([storage, "v1"], io.StringIO(), err) == 1
    assert "students/v1: model.safetensors are not what the training wrote; restore" in err.getvalue()
    assert ReleaseHistory(storage).current().version == "v2"  # type: ignore[union-attr]


def test_a_rollback_waits_for_no_run(storage: str) -> None:
    err = io.StringIO()
    with lease(storage):
        assert roll_back([storage, "v1"], io.StringIO(), err) == 1
    assert "storage" in err.getvalue()
    assert len(ReleaseHistory(storage).decisions()) == 3


def test_a_student_is_compared_with_the_released_and_the_best_one_but_not_with_itself(storage: str) -> None:
    history = ReleaseHistory(storage)
    assert [(rival.version, rival.role) for rival in rivals(history, "v4")] == [("v2", RELEASED), ("v1", BEST)]
    assert [(rival.version, rival.role) for rival in rivals(history, "v2")] == [("v1", BEST)]


def test_the_released_student_is_measured_on_tasks_if_its_weights_are_there(storage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = open_run(load_config(SMOKE, [f"storage={storage}", f"student.model={tmp_path}"]), GRAPH.specs)
    trained = {"attention": "hyper_attention", "hyper_attention": {"window": 64}, "hyper_attention_layers": "even"}
    for version, config in (("v1", {}), ("v2", trained)):
        (Path(storage) / "students" / version / "manifest.json").write_text(a_result(config).model_dump_json())
    found = {rival.role: rival.folder for rival in models_of(run, "v4", "new").rivals}
    assert found == {RELEASED: f"{storage}/students/v2", BEST: f"{storage}/students/v1"}
    attention = {rival.role: rival.attention for rival in models_of(run, "v4", "new").rivals}
    assert attention == {
        RELEASED: TrainedAttention("hyper_attention", {"window": 64}, "even"),
        BEST: TrainedAttention(),
    }
    shutil.rmtree(f"{storage}/students/v2")
    assert {rival.role: rival.folder for rival in models_of(run, "v4", "new").rivals}[RELEASED] == ""


def test_evaluation_follows_the_students_resources(tmp_path: Path) -> None:
    overrides = ["train.gpus_per_worker=1", "pack.max_tokens=8192", f"storage={tmp_path}"]
    followed = evaluate_config(load_config(SMOKE, overrides))
    assert (followed.gpus_per_actor, followed.precision, followed.max_tokens) == (1, "fp32", 8192)
    assert evaluate_config(load_config(SMOKE, [*overrides, "train.precision=bf16"])).precision == "bf16"
    named = evaluate_config(load_config(SMOKE, [*overrides, "evaluate.gpus_per_actor=0", "evaluate.max_tokens=99"]))
    assert (named.gpus_per_actor, named.max_tokens) == (0, 99)
