"""Conversions of checkpoints that fail. Those that succeed are tested on real workers in test_train.py."""

import pytest

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
