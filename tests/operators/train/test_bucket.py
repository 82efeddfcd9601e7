"""A student in a bucket: all that its training needs to continue is there after any kill, and only complete files."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from operators.files.atomic import put_file
from operators.files.copies import files_below, pull, push, read_text
from operators.train import bucket as module
from operators.train.bucket import _attended, _opened, _place_of, working_copy, working_folder
from operators.train.checkpoint import MARKER
from operators.train.config import TrainConfig
from operators.train.job import CHECKPOINTS, EXPORTED, FAILED, TrainJob
from operators.train.metrics import METRICS, StepMetrics, lines_of
from operators.train.node_copy import NodeCopy
from operators.train.result import TrainResult
from operators.train.stopping import STOP, stop_is_asked
from operators.train.train import train
from operators.train.trainer import Trainer
from tests.operators.train import two_nodes
from tests.operators.train.standing_workers import trainer_of


@pytest.fixture
def home(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path / "cache"))
    return f"{bucket}/runs/students/v1"


@pytest.fixture
def one_worker(process_group: None, local_ray: None) -> None:
    """This process as the only worker: in the one process group that it can have."""


@pytest.fixture
def copy(home: str, tmp_path: Path) -> NodeCopy:
    made = NodeCopy(tmp_path / "disk", home, mates=(0,))
    (made.folder / CHECKPOINTS).mkdir(parents=True)
    return made


def job_of(home: str) -> TrainJob:
    return TrainJob(TrainConfig(), "student", home, [f"{home}/{CHECKPOINTS}/packs/0.parquet"], "digest", "identity")


def test_workers_know_their_node_and_who_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(4):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        found.append(_place_of(["b", "a", "b", "c"]))
    assert found == [(0, (0, 2)), (1, (1,)), (0, (0, 2)), (2, (3,))]
    assert len({working_folder("s3://b/v1", node) for node in range(3)}) == 3, "they may share a disk"


def test_a_node_removes_what_it_or_a_lost_node_left_on_its_disk(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, owner in enumerate(["lost", "second", "first", ""]):
        folder = working_folder(home, number)
        (folder / CHECKPOINTS).mkdir(parents=True)
        if owner:
            (folder / module.NODE).write_text(owner)
    other = working_folder("s3://another/student")
    other.mkdir()
    monkeypatch.setattr(module, "rank", lambda: 1)
    module._clear(home, ["first", "second"])
    assert set(other.parent.iterdir()) == {other, working_folder(home, 2)}


def test_a_stop_signal_to_the_driver_reaches_the_workers(copy: NodeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    with _attended(copy):
        assert not stop_is_asked(copy.folder)
        put_file(f"{copy.home}/{CHECKPOINTS}/{STOP}", "")
        end = time.monotonic() + 20
        while not stop_is_asked(copy.folder):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_file_that_marks_a_student_as_complete_comes_last(copy: NodeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(
        module, "push", lambda *place_and_names: (pushed.extend(place_and_names[2]), push(*place_and_names))
    )
    monkeypatch.setattr(module, "put_file", lambda place, text: (pushed.append(place), put_file(place, text)))
    for name in ("model.safetensors", "config.json", f"{CHECKPOINTS}/step-00000001/shard"):
        (copy.folder / name).parent.mkdir(exist_ok=True)
        (copy.folder / name).write_text("{}")
    with _attended(copy):
        exported = copy.folder / CHECKPOINTS / EXPORTED
        exported.write_text(json.dumps({"notes": [f"checkpoint {copy.folder}/{CHECKPOINTS}/step-00000001"]}))
    assert pushed[-1] == f"{copy.home}/{CHECKPOINTS}/{EXPORTED}"
    assert set(files_below(copy.home)) == {"model.safetensors", "config.json", f"{CHECKPOINTS}/{EXPORTED}"}
    told = json.loads(read_text(pushed[-1]) or "")
    assert told == {"notes": [f"checkpoint {copy.home}/{CHECKPOINTS}/step-00000001"]}


def test_a_student_that_cannot_be_copied_is_tried_again_and_then_an_error(
    copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise OSError("down")

    monkeypatch.setattr("operators.train.node_copy.RETRY_S", 0.01)
    monkeypatch.setattr("operators.train.node_copy.PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "push", fail)
    with pytest.raises(RuntimeError, match=f"the student could not be copied to {copy.home}: down"), _attended(copy):
        pass
    assert len(tries) > 1


def test_metrics_are_kept_when_training_fails_and_its_error_counts(copy: NodeCopy) -> None:
    (copy.folder / METRICS).write_text("{}\n")
    with pytest.raises(ZeroDivisionError), _attended(copy):
        1 / 0  # noqa: B018
    assert read_text(f"{copy.home}/{METRICS}") == "{}\n"


def test_unfinished_checkpoints_are_deleted_and_exports_that_were_cut_off_are_not_fetched(home: str) -> None:
    kept = {f"{CHECKPOINTS}/packs/0.parquet", METRICS, "tensorboard/events", f"{CHECKPOINTS}/{FAILED}"}
    complete, best = (f"{CHECKPOINTS}/{name}" for name in ("step-00000001", "best/step-00000002"))
    others = {f"{CHECKPOINTS}/step-00000003/shard", f"{CHECKPOINTS}/best/step-00000004/shard"}
    left = {"model.safetensors", *(f"{place}/{name}" for place in (complete, best) for name in (MARKER, "shard"))}
    for name in kept | others | left:
        put_file(f"{home}/{name}", "{}")
    names, known = _opened(home)
    assert names == kept
    assert known == {complete, best}
    assert set(files_below(home)) == kept | left


def test_an_attempt_fetches_what_is_in_the_bucket_and_leaves_nothing_on_the_disk(home: str, one_worker: None) -> None:
    put_file(f"{home}/{CHECKPOINTS}/packs/0.parquet", "packs")
    put_file(f"{home}/{CHECKPOINTS}/step-00000001/shard", "one")
    put_file(f"{home}/{CHECKPOINTS}/step-00000001/{MARKER}", '{"files": {"shard": 3}}')
    put_file(f"{home}/{CHECKPOINTS}/ray_train/state", "Ray's own")
    stale = working_folder(home) / "stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an attempt that was killed")
    with working_copy(job_of(home)) as job:
        folder = Path(job.folder)
        assert Path(job.files[0]).read_text() == "packs"
        assert {path.name for path in (folder / CHECKPOINTS).iterdir()} == {"packs", "node"}, "without checkpoints"
        assert job.copy is not None
        assert (job.copy.home, job.copy.mates, job.copy.known) == (home, (0,), {f"{CHECKPOINTS}/step-00000001"})
        assert not stale.exists()
        (folder / "config.json").write_text("{}")
    assert read_text(f"{home}/config.json") == "{}"
    assert not folder.exists()


def test_a_permanent_error_is_reported_with_the_path_that_the_user_knows(home: str, one_worker: None) -> None:
    def attempt() -> None:
        with working_copy(job_of(home)) as job:
            (Path(job.folder) / CHECKPOINTS / FAILED).write_text(json.dumps({"error": f"delete {job.folder}"}))
            raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        attempt()
    assert json.loads(read_text(f"{home}/{CHECKPOINTS}/{FAILED}") or "") == {"error": f"delete {home}"}


@pytest.mark.slow
@pytest.mark.long
def test_nodes_that_share_no_folder_train_one_student_also_after_a_kill_and_after_one_worker(
    home: str, one_worker: None, packs_file: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operators.train.train.TorchTrainer", trainer_of([]))
    monkeypatch.setattr(Trainer, "evaluate", two_nodes.validation_losses)
    packs, config = ray.data.read_parquet(packs_file), two_nodes.CONFIG.model_copy(update={"num_workers": 1})
    alone = train(packs, config, tiny_model, str(tmp_path / "alone"))
    lose_the_only_worker_after(5, packs, config, tiny_model, home)
    newest = f"{home}/{CHECKPOINTS}/step-00000004"
    put_file(f"{newest}/{next(name for name in files_below(newest) if 'zero_pp_rank_0' in name)}", "damaged")

    run_two_nodes(tmp_path, packs_file, tiny_model, home)
    killed = json.loads((tmp_path / "killed.json").read_text())
    assert killed["disk"].startswith(f"{tmp_path}/disk-")
    assert [name for name in killed["bucket"] if "rank_1_" in name or name == MARKER] == []
    assert "step-00000006/state/zero_pp_rank_1_mp_rank_00_optim_states.pt" in killed["here"]
    of_first = {name.split("/")[0] for name in killed["here"] if "zero_pp_rank_0" in name}
    assert of_first == {"step-00000002"}, "a node has the first worker's shard only of what it converted"
    pids = [line["pid"] for line in lines_of(read_text(f"{home}/{METRICS}") or "")]
    assert [pids.index(pid) for pid in pids] == [0, 0, 2, 2, 4, 4, 4, 4], "each attempt goes on at the checkpoint"
    result = TrainResult.model_validate_json((tmp_path / "result.json").read_text())
    assert (result.num_workers, result.best_step) == (2, two_nodes.BEST_AT)
    assert result.losses == pytest.approx(alone.losses, rel=1e-5)
    pull(home, tmp_path / "student")
    students = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "student")]
    for name, weight in students[0].items():
        torch.testing.assert_close(
            students[1][name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert not [name for name in files_below(home) if name.startswith(CHECKPOINTS)]
    assert not list(tmp_path.glob("disk-*/training/*"))


def lose_the_only_worker_after(steps: int, packs: Any, config: TrainConfig, model: str, home: str) -> None:
    """Train so many steps in this process; the last checkpoint before is in the bucket."""
    step = Trainer.step

    def stepped(trainer: Trainer, number: int, *rest: Any) -> StepMetrics:
        if number == steps:
            raise RuntimeError("the worker is lost")
        return step(trainer, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stepped)
        with pytest.raises(RuntimeError, match="the worker is lost"):
            train(packs, config.model_copy(update={"checkpoint_in_background": False}), model, home)


def run_two_nodes(*arguments: object) -> None:
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as short:  # sockets lie there
        paths = {"RAY_TMPDIR": short, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | paths
        command = [sys.executable, two_nodes.__file__, *map(str, arguments)]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=400)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
