"""Conversions of checkpoints that fail. Those that succeed are tested on real workers in test_train.py."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from operators.train import checkpoint as module
from operators.train import resize
from operators.train.checkpoint import Checkpoint, CheckpointSpec
from operators.train.loop import would_repeat


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("error", "tried_again"), [(KeyError("param_shapes"), False), (OSError("stale file handle"), True)]
)
def test_a_conversion_that_would_fail_again_ends_the_run_and_leaves_nothing(error, tried_again, tmp_path, monkeypatch):
    def fail(_, target):
        target.mkdir(parents=True)
        raise error

    monkeypatch.setattr(resize, "_convert", fail)
    checkpoint = Checkpoint(tmp_path / "step-00000004", 4, CheckpointSpec("identity", 2, 2))
    with pytest.raises(
        (RuntimeError, ValueError), match=r"of 2 workers cannot be converted for 1: .*num_workers to 2"
    ) as raised:
        resize.converted(checkpoint)
    assert would_repeat(raised.value) is not tried_again
    assert list(tmp_path.iterdir()) == []


def test_the_others_wait_hours_for_the_worker_that_converts_in_a_group_without_a_watchdog(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **keys: done.append(("group", keys)) or "patient")
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: done.append(("end", group)))
    monkeypatch.setattr(resize, "_convert", lambda *_: done.append(("converted", None)))
    monkeypatch.setattr(
        dist,
        "all_gather_object",
        lambda parts, part, group: (done.append(("wait", group)), parts.__setitem__(slice(None), [part] * 2)),
    )
    resize.converted(Checkpoint(tmp_path / "step-00000004", 4, CheckpointSpec("identity", 2, 2)))
    keys = {"backend": "gloo", "timeout": timedelta(hours=12)}
    assert done == [("group", keys), ("converted", None), ("wait", "patient"), ("end", "patient")]
