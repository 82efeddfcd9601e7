"""What is copied between a bucket and the disks of the nodes, and which checkpoints in the bucket count."""

import json
import shutil
import threading
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest

from operators.files.atomic import put_file
from operators.files.copies import files_below, read_text
from operators.train import node_copy
from operators.train.checkpoint import MARKER, CheckpointSpec, damage, marker_of, newest_good
from operators.train.job import CHECKPOINTS
from operators.train.metrics import METRICS
from operators.train.node_copy import KEY_VARIABLE, NodeCopy, checkpoint_of, persistently

SPEC = CheckpointSpec("identity", world_size=2, zero_stage=2)
MODEL = "state/mp_rank_00_model_states.pt"
SHARDS = [f"state/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]


@pytest.fixture
def copy(bucket: str, tmp_path: Path) -> NodeCopy:
    return NodeCopy(tmp_path / "disk", f"{bucket}/students/v1", mates=(0,))


def stored(copy: NodeCopy, step: int, spec: CheckpointSpec = SPEC) -> str:
    """A checkpoint of two workers in the bucket; returns its place."""
    folder = copy.folder / CHECKPOINTS / f"step-{step:08}"
    files = {name: f"{name} of step {step}" for name in (MODEL, *SHARDS)}
    for name, text in files.items():
        put_file(f"{copy.there(folder)}/{name}", text)
    digests = {name: (len(text), sha256(text.encode()).hexdigest()) for name, text in files.items()}
    put_file(f"{copy.there(folder)}/{MARKER}", json.dumps(marker_of(step, spec, digests)))
    return copy.there(folder)


def test_a_checkpoint_in_the_bucket_without_our_signature_is_not_read(
    copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy.folder / CHECKPOINTS / "step-00000001"
    spec = replace(SPEC, world_size=1)
    place = stored(copy, 1, spec)
    marker = json.loads(read_text(f"{place}/{MARKER}") or "")
    assert newest_good(folder.parent, spec, copy)[0] is not None, "without a key, the bucket is trusted"

    monkeypatch.setenv(KEY_VARIABLE, "a secret")
    found, problems = newest_good(folder.parent, spec, copy)
    assert found is None
    assert "is damaged" in problems[0]
    copy.commit(folder, marker, keep=1)
    assert newest_good(folder.parent, spec, copy)[0] is not None

    forged = "another pickle"
    put_file(f"{place}/{MODEL}", forged)
    content = json.loads(read_text(f"{place}/{MARKER}") or "")
    content["digests"][MODEL], content["files"][MODEL] = sha256(forged.encode()).hexdigest(), len(forged)
    put_file(f"{place}/{MARKER}", json.dumps(content))
    assert newest_good(folder.parent, spec, copy)[0] is None
    monkeypatch.delenv(KEY_VARIABLE)
    assert newest_good(folder.parent, spec, copy)[0] is not None, "so the signature alone told them apart"


@pytest.mark.parametrize(("workers", "wanted"), [(2, [MODEL, SHARDS[1]]), (3, [MODEL, *SHARDS])])
def test_a_node_fetches_what_its_workers_read_and_all_shards_after_a_change_of_their_number(
    workers: int, wanted: list[str], copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(copy, 1)
    monkeypatch.setattr(node_copy, "world_size", lambda: workers)
    second = replace(copy, mates=(1,))
    [found] = second.committed(copy.folder / CHECKPOINTS)
    assert (found.step, found.spec, found.mates) == (1, SPEC, (1,))
    monkeypatch.setattr("operators.train.checkpoint.rank", lambda: 1)
    second.fetch(found)
    assert sorted(files_below(str(found.folder))) == sorted([MARKER, *wanted])
    assert damage(found) == ""
    (found.folder / MODEL).write_text("of another run")
    assert "is damaged (state/mp_rank_00_model_states.pt)" in damage(found)


def test_what_a_node_has_already_is_not_fetched_again(copy: NodeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(copy, 1)
    monkeypatch.setattr(node_copy, "world_size", lambda: 2)
    [found] = copy.committed(copy.folder / CHECKPOINTS)
    copy.fetch(found)
    whole = json.loads((found.folder / MARKER).read_text())
    (found.folder / SHARDS[0]).write_text("is here")
    del whole["digests"][MODEL]
    (found.folder / MODEL).unlink()
    (found.folder / MARKER).write_text(json.dumps(whole))
    copy.fetch(found)
    assert (found.folder / SHARDS[0]).read_text() == "is here"
    assert (found.folder / MODEL).read_text() == f"{MODEL} of step 1"


@pytest.mark.parametrize("fault", ["changed", "lost", "without digests"])
def test_a_damaged_or_lost_part_makes_the_older_checkpoint_be_taken(fault: str, copy: NodeCopy) -> None:
    stored(copy, 1)
    newest = stored(copy, 2)
    found, problems = newest_good(copy.folder / CHECKPOINTS, SPEC, copy)
    assert found is not None
    assert (found.step, problems) == (2, [])
    shutil.rmtree(copy.folder)
    if fault == "changed":
        put_file(f"{newest}/{SHARDS[1]}", f"{SHARDS[1]} of step 3")
    elif fault == "lost":
        node_copy.delete(f"{newest}/{SHARDS[1]}")
    else:
        marker = json.loads(read_text(f"{newest}/{MARKER}") or "")
        put_file(f"{newest}/{MARKER}", json.dumps(marker | {"digests": {}}))
    found, problems = newest_good(copy.folder / CHECKPOINTS, SPEC, copy)
    assert found is not None
    assert found.step == 1
    assert len(problems) == 1
    assert f"step-00000002 is damaged ({SHARDS[0] if fault == 'without digests' else SHARDS[1]})" in problems[0]


def test_a_checkpoint_of_another_run_is_refused_with_its_place_in_the_bucket(copy: NodeCopy) -> None:
    stored(copy, 1, replace(SPEC, identity="other"))
    with pytest.raises(ValueError, match=f"identity=other, .* or delete {copy.home}/checkpoints to train"):
        newest_good(copy.folder / CHECKPOINTS, SPEC, copy)
    assert not copy.folder.exists(), "nothing is fetched of it"


def test_a_commit_deletes_older_checkpoints_and_what_is_left_of_unfinished_ones(copy: NodeCopy) -> None:
    for step in (1, 2, 9):
        stored(copy, step)
    checkpoints = copy.folder / CHECKPOINTS
    put_file(f"{copy.there(checkpoints)}/step-00000003/{MODEL}", "given up")
    put_file(f"{copy.there(checkpoints)}/packs/0.parquet", "packs")
    checkpoints.mkdir(parents=True)
    (copy.folder / METRICS).write_text("{}\n")
    copy.commit(checkpoints / "step-00000004", {"step": 4, "spec": asdict(SPEC), "files": {}}, keep=2)
    left = {name.split("/")[0] for name in files_below(copy.there(checkpoints))}
    assert left == {"packs", "step-00000002", "step-00000004", "step-00000009"}
    assert read_text(f"{copy.home}/{METRICS}") == "{}\n"
    assert [found.step for found in copy.committed(checkpoints)] == [2, 4, 9]


def test_metrics_are_there_before_the_checkpoint_counts(copy: NodeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(node_copy, "push", lambda folder, place, names: order.extend(names))
    monkeypatch.setattr(node_copy, "put_file", lambda place, text: order.append(place.rpartition("/")[2]))
    copy.folder.mkdir()
    (copy.folder / METRICS).write_text("")
    copy.commit(copy.folder / CHECKPOINTS / "step-00000004", {}, keep=2)
    assert order == [METRICS, MARKER]


def test_only_a_checkpoint_of_an_earlier_attempt_is_forgotten_and_its_marker_first(
    copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, new = stored(copy, 1), stored(copy, 2)
    deleted: list[str] = []
    delete = node_copy.delete
    monkeypatch.setattr(node_copy, "delete", lambda place: (deleted.append(place), delete(place)))
    copy = replace(copy, known=frozenset({f"{CHECKPOINTS}/step-00000001"}))
    for step in (1, 2):
        copy.forget(copy.folder / CHECKPOINTS / f"step-{step:08}")
    assert deleted == [f"{known}/{MARKER}", known]
    assert set(files_below(copy.home)) == {f"{new.removeprefix(f'{copy.home}/')}/{n}" for n in (MARKER, MODEL, *SHARDS)}


def test_a_bucket_that_cannot_be_written_is_reported_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_copy, "RETRY_S", 0.01)
    tries = iter(range(4))

    def act() -> None:
        if next(tries) < 3:
            raise OSError("no network to s3://key:secret@bucket")

    assert persistently(act, threading.Event(), "s3://home") == ""
    [record] = caplog.records
    assert "s3://home is tried again: it could not be written: no network to s3://…@bucket" in record.message


def test_it_is_given_up_only_after_something_has_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copy, "RETRY_S", 0.01)
    monkeypatch.setattr(node_copy, "PATIENCE_S", 0.1)
    hurry, tries = threading.Event(), []

    def act() -> None:
        tries.append(hurry.is_set())
        if len(tries) == 50:
            hurry.set()
        raise OSError("down")

    assert persistently(act, hurry, "s3://home") == "down"
    assert not any(tries[:50])
    assert len(tries) > 51


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (f"checkpoints/step-00000001/{MODEL}", "checkpoints/step-00000001"),
        ("checkpoints/best/step-00000001/COMPLETE", "checkpoints/best/step-00000001"),
        ("checkpoints/packs/0.parquet", ""),
        ("checkpoints/step-00000001", ""),
    ],
)
def test_a_file_belongs_to_the_checkpoint_whose_folder_it_is_in(name: str, folder: str) -> None:
    assert checkpoint_of(name) == folder
