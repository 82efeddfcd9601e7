"""Checkpoints that are written while training goes on: what is in them, when they count, and what errors do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from operators.files.copies import files_below, read_text
from operators.train import node_copy, saving
from operators.train.checkpoint import MARKER, complete_checkpoints, newest_good
from operators.train.engine import loaded
from operators.train.job import TrainJob
from operators.train.node_copy import NodeCopy
from operators.train.pack_order import PackStore
from operators.train.saving import Saver, save_checkpoint
from operators.train.trainer import NotFiniteError, Trainer
from tests.operators.train import killed_writer
from tests.operators.train.differences import differences
from tests.operators.train.killed_writer import SPEC, Engine

LIMIT_S = 60.0


def steps(folder: Path) -> list[int]:
    return [found.step for found in complete_checkpoints(folder)]


def heard(saver: Saver) -> tuple[float, float, float]:
    """What the only worker says once its part is written."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if saver.say()[1]:
            return saver.say()
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture
def held(process_group: None, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every thread back before it writes, until it is set."""
    event, write = threading.Event(), saving._Copies.write

    def later(copies: Any, *arguments: Any) -> saving.Written:
        assert event.wait(LIMIT_S)
        return write(copies, *arguments)

    monkeypatch.setattr(saving._Copies, "write", later)
    return event


def test_a_checkpoint_holds_the_state_of_its_moment_and_counts_when_all_is_written(
    held: threading.Event, tmp_path: Path
) -> None:
    engine = Engine()
    with Saver(engine, SPEC) as saver:
        saver.save(tmp_path, 1)
        engine.weight += 1
        assert saver.say() == (0, 0, 0)
        saver.hear(saver.say())
        assert steps(tmp_path) == []
        held.set()
        saver.hear(heard(saver))
        assert steps(tmp_path) == [1]
    found, problems = newest_good(tmp_path, SPEC)
    assert found is not None
    assert problems == []
    assert torch.load(found.folder / "state" / "shard.pt")["weight"].tolist() == [0, 0, 0, 0]
    assert set(json.loads((found.folder / "COMPLETE").read_text())["digests"]) == {"script.py", "state/shard.pt"}


def test_a_second_save_waits_for_the_first_and_the_end_for_both(held: threading.Event, tmp_path: Path) -> None:
    engine = Engine()
    with Saver(engine, SPEC) as saver:
        saver.save(tmp_path, 1)
        threading.Timer(0.3, held.set).start()
        saver.waited()
        saver.save(tmp_path, 2)
        assert saver.waited() > 0.2
        assert steps(tmp_path) == [1]
    assert steps(tmp_path) == [1, 2]


@pytest.mark.usefixtures("process_group")
def test_old_checkpoints_are_removed_and_an_unfinished_one_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "half").write_text("")
    with Saver(Engine(), SPEC) as saver:
        for step in (1, 2, 3):
            saver.save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [2, 3]
    assert not (tmp_path / "step-00000003" / "half").exists()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("at", ["hear", "save", "end"])
def test_a_part_that_cannot_be_written_is_an_error_of_one_line(at: str, tmp_path: Path) -> None:
    engine = Engine()
    with Saver(engine, SPEC) as saver:
        saver.save(tmp_path, 1)
    engine.checkpoint_engine = SimpleNamespace(save=lambda *_: (_ for _ in ()).throw(OSError(28, "No space\nleft")))
    saver = Saver(engine, SPEC)
    saver.save(tmp_path, 2)
    failing = {
        "hear": lambda: saver.hear(heard(saver)),
        "save": lambda: saver.save(tmp_path, 3),
        "end": saver.finish,
    }
    with pytest.raises(
        RuntimeError, match=r"step-00000002 could not be written: OSError: \[Errno 28\] No space left; "
    ):
        failing[at]()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the rest of the failed one takes no disk"


@pytest.mark.usefixtures("process_group")
def test_time_asks_for_a_checkpoint_and_each_one_starts_it_anew(tmp_path: Path) -> None:
    with Saver(Engine(), SPEC, every_minutes=0.2 / 60) as saver:
        saver.hear(saver.say())
        assert not saver.due
        time.sleep(0.25)
        saver.hear(saver.say())
        assert saver.due
        saver.save(tmp_path, 1)
        saver.hear(saver.say())
        assert not saver.due
    with Saver(Engine(), SPEC) as never:
        assert never.say()[0] == 0


@pytest.mark.usefixtures("process_group")
def test_a_leaving_node_asks_for_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[frozenset[str]] = [frozenset()]
    monkeypatch.setattr("operators.train.stopping.leaving_nodes", lambda: told[0])
    due = []
    with Saver(Engine(), SPEC) as saver:
        for nodes in ("", "a", "a", "ab", "ab"):
            told[0] = frozenset(nodes)
            saver.hear(saver.say())
            due.append(saver.due)
    assert due == [False, True, False, True, False]


@pytest.mark.parametrize(("error", "completed"), [(NotFiniteError, [1]), (ValueError, [])])
def test_only_an_error_that_all_workers_have_waits_for_the_checkpoint(
    error: type[Exception], completed: list[int], held: threading.Event, tmp_path: Path
) -> None:
    def fail() -> None:
        with Saver(Engine(), SPEC) as saver:
            saver.save(tmp_path, 1)
            raise error

    threading.Timer(0.3, held.set).start()
    with pytest.raises(error):
        fail()
    assert steps(tmp_path) == completed


@pytest.fixture
def copy(process_group: None, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeCopy:
    monkeypatch.setattr(node_copy, "RETRY_S", 0.01)
    monkeypatch.setattr(node_copy, "PATIENCE_S", 0.1)
    return NodeCopy(tmp_path, f"{bucket}/v1", mates=(0,))


def steps_there(copy: NodeCopy) -> list[int]:
    return [found.step for found in copy.committed(copy.folder / "checkpoints")]


def test_a_checkpoint_counts_in_the_bucket_when_all_of_it_is_there(
    copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_through, push, checkpoints = threading.Event(), node_copy.push, copy.folder / "checkpoints"

    def later(*arguments: Any) -> None:
        assert let_through.wait(LIMIT_S)
        push(*arguments)

    monkeypatch.setattr(node_copy, "push", later)
    with Saver(Engine(), SPEC, copy=copy) as saver:
        saver.save(checkpoints, 1)
        end = time.monotonic() + LIMIT_S
        while not (checkpoints / "step-00000001" / "state" / "shard.pt").is_file():
            assert time.monotonic() < end
            time.sleep(0.01)
        saver.hear(saver.say())
        assert (steps(checkpoints), steps_there(copy)) == ([], [])
        let_through.set()
        saver.hear(heard(saver))
        saver.finish()
        assert (steps(checkpoints), steps_there(copy)) == ([1], [1])
        for step in (2, 3):
            saver.save(checkpoints, step, keep=2)
    assert steps_there(copy) == [2, 3]
    names = {
        f"checkpoints/step-{step:08}/{name}" for step in (2, 3) for name in (MARKER, "script.py", "state/shard.pt")
    }
    assert set(files_below(copy.home)) == names


@pytest.mark.parametrize(
    ("other", "counts"), [({}, True), ({"failed": "no space"}, False), ({"missing": "down"}, False)]
)
def test_a_marker_on_a_disk_names_the_parts_there_and_that_in_the_bucket_all_parts(
    other: dict[str, str], counts: bool, copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_other = saving._Part({"state/other.pt": (1, "digest")}, **other)
    monkeypatch.setattr(saving, "gathered", lambda part: [part, of_other] if isinstance(part, saving._Part) else [part])
    checkpoints, saver = copy.folder / "checkpoints", Saver(Engine(), SPEC, copy=copy)
    saver.save(checkpoints, 1)
    if counts:
        saver.finish()
        markers = [(checkpoints / "step-00000001" / MARKER).read_text()]
        markers.append(read_text(f"{copy.home}/checkpoints/step-00000001/{MARKER}") or "")
        here, there = (json.loads(marker)["files"].keys() for marker in markers)
        assert here == {"script.py", "state/shard.pt"}
        assert there == here | {"state/other.pt"}
    else:
        with pytest.raises(RuntimeError, match=r"no space|could not be copied to .*: down"):
            saver.finish()
        assert (list(checkpoints.iterdir()), steps_there(copy)) == ([], [])


@pytest.mark.parametrize("failing", ["push", "put_file"])
def test_a_bucket_that_cannot_be_written_costs_a_checkpoint_and_ends_nothing_before_the_end(
    failing: str, copy: NodeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = copy.folder / "checkpoints"

    def fail(*_: Any) -> None:
        raise OSError("down")

    saver = Saver(Engine(), SPEC, copy=copy)
    saver.save(checkpoints, 1)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(node_copy, failing, fail)
        saver.save(checkpoints, 2)
        saver.save(checkpoints, 3)
        saver.waited()
        with pytest.raises(RuntimeError, match=f"the last checkpoint could not be copied to {copy.home}: down"):
            saver.finish()
        assert saver.waited() > 0.1
        assert steps_there(copy) == [1]
    saver.save(checkpoints, 4)
    saver.finish()
    assert steps_there(copy) == [1, 4]
    assert "step-00000003" not in str(files_below(copy.home)), "what was left of it is deleted"


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_a_process_killed_while_it_writes_leaves_the_older_checkpoint_in_use(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    ended = subprocess.run([sys.executable, killed_writer.__file__, tmp_path], env={**os.environ, **paths}, timeout=240)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "step-00000002" / "state" / "shard.pt").stat().st_size > 0
    found, problems = newest_good(tmp_path, SPEC)
    assert found is not None
    assert (found.step, problems) == (1, [])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")])
def test_steps_that_follow_do_not_change_what_is_written(
    stage: int, precision: str, job: TrainJob, held: threading.Event, tmp_path: Path
) -> None:
    one = replace(job, config=job.config.model_copy(update={"zero_stage": stage, "precision": precision}))
    with loaded(one) as (engine, noise):
        trainer = Trainer(one, engine, noise, PackStore(job.files))
        trainer.step(0)
        held.set()
        save_checkpoint(engine, tmp_path / "blocking", 1, one.spec)
        held.clear()
        with Saver(engine, one.spec) as saver:
            saver.save(tmp_path / "background", 1)
            trainer.step(1)
            held.set()
            saver.finish()
            trainer.step(2)
            saver.save(tmp_path / "background", 3)  # into the same copies
    states = [sorted((tmp_path / name / "step-00000001").glob("state/*.pt")) for name in ("blocking", "background")]
    assert len(states[0]) == (1 if stage == 0 and precision == "fp32" else 2)
    for blocking, background in zip(*states, strict=True):
        assert blocking.name == background.name
        apart = differences(torch.load(blocking, weights_only=False), torch.load(background, weights_only=False))
        assert apart == []
