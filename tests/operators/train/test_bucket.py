"""A student in a bucket: all that its training needs to continue is there after any kill, and only complete files."""

import json
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from operators.files.atomic import put_file
from operators.files.copies import files_below, push, read_text
from operators.train.bucket import CHECKPOINTS, EXPORTED, FAILED, MARKER, Mirror, working_copy, working_folder
from operators.train.config import TrainConfig
from operators.train.job import TrainJob
from operators.train.stopping import STOP, stop_is_asked


@pytest.fixture
def home(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path / "cache"))
    return f"{bucket}/runs/students/v1"


@pytest.fixture
def one_worker(process_group: None, local_ray: None) -> None:
    """This process as the only worker: in the one process group that it can have."""


def job_of(home: str) -> TrainJob:
    return TrainJob(TrainConfig(), "student", home, [f"{home}/{CHECKPOINTS}/packs/0.parquet"], "digest", "identity")


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    made = folder / CHECKPOINTS / f"step-{step:08}"
    made.mkdir(parents=True)
    (made / "shard").write_text(f"of step {step}")
    if complete:
        (made / MARKER).write_text(json.dumps({"files": {"shard": 9}}))
    return made


def test_complete_checkpoints_are_mirrored_and_deleted_ones_deleted(home: str, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, home)
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, complete=False)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    mirror.look()
    assert set(files_below(home)) == {
        "metrics.jsonl",
        *(f"{CHECKPOINTS}/step-00000001/{name}" for name in ("shard", MARKER)),
    }
    (second / MARKER).write_text(json.dumps({"files": {"shard": 9}}))
    for file in first.iterdir():
        file.unlink()
    mirror.look()
    assert {name.split("/")[1] for name in files_below(home) if "/" in name} == {"step-00000002"}


def test_a_stop_signal_to_the_driver_reaches_the_workers(home: str, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    mirror = Mirror(tmp_path, home)
    mirror.look()
    assert not stop_is_asked(tmp_path)
    put_file(f"{home}/{CHECKPOINTS}/{STOP}", "")
    assert stop_is_asked(home)
    mirror.look()
    assert stop_is_asked(tmp_path)


def test_a_checkpoint_that_vanishes_while_it_is_copied_leaves_nothing(home: str, tmp_path: Path) -> None:
    (checkpoint(tmp_path, 1) / "shard").unlink()
    Mirror(tmp_path, home).look()
    assert files_below(home) == {}


def test_the_file_that_marks_a_student_as_complete_comes_last(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(
        "operators.train.bucket.push",
        lambda *place_and_names: (pushed.extend(place_and_names[2]), push(*place_and_names)),
    )
    (tmp_path / CHECKPOINTS).mkdir()
    for name in ("model.safetensors", "config.json", f"{CHECKPOINTS}/{EXPORTED}"):
        (tmp_path / name).write_text("{}")
    with Mirror(tmp_path, home):
        pass
    assert pushed[-1] == f"{CHECKPOINTS}/{EXPORTED}"
    assert set(files_below(home)) == set(pushed) == {"model.safetensors", "config.json", f"{CHECKPOINTS}/{EXPORTED}"}


def test_the_mirror_looks_while_the_training_goes_on(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operators.train.bucket.LOOK_S", 0.01)
    looked = threading.Event()
    monkeypatch.setattr(Mirror, "look", lambda self: looked.set())
    with Mirror(tmp_path, home):
        assert looked.wait(20)


def test_an_attempt_goes_on_from_what_is_in_the_bucket_and_leaves_nothing_on_the_disk(
    home: str, one_worker: None, tmp_path: Path
) -> None:
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
        assert sorted(path.name for path in (folder / CHECKPOINTS).iterdir()) == ["packs", "step-00000001"]
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


def test_workers_on_several_nodes_are_refused_with_the_cure(
    home: str, one_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda nodes, _: nodes.__setitem__(slice(None), ["a", "b"]))
    with pytest.raises(ValueError, match="2 workers are on 2 nodes"), working_copy(job_of(home)):
        pytest.fail("trained all the same")
    assert "lower train.num_workers" in json.loads(read_text(f"{home}/{CHECKPOINTS}/{FAILED}") or "")["error"]


def test_a_bucket_that_cannot_be_written_is_reported_once_and_tried_again(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("operators.train.bucket.LOOK_S", 0.01)
    mirror, looks = Mirror(tmp_path, home), iter(range(4))

    def look() -> None:
        if next(looks) < 3:
            raise OSError("no network to s3://key:secret@bucket")
        mirror._ended.set()

    monkeypatch.setattr(mirror, "look", look)
    mirror.run()
    [record] = caplog.records
    assert f"{home} is tried again: a checkpoint could not be copied: no network to s3://…@bucket" in record.message
