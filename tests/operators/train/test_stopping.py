"""A signal to stop is held back until the workers have saved, and then takes effect."""

import os
import signal

import pytest

from operators.train.stopping import leaving_nodes, stop_is_asked, stopping_cleanly


@pytest.fixture
def arrived():
    """The signals that reached the earlier handler."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_the_first_signal_waits_for_the_training_and_the_second_does_not(tmp_path, arrived):
    (tmp_path / "checkpoints").mkdir()
    with stopping_cleanly(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_is_asked(tmp_path)
        assert arrived == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrived == [signal.SIGTERM]
    assert arrived == [signal.SIGTERM] * 2


def test_without_a_signal_nothing_happens_and_an_earlier_one_is_forgotten(tmp_path, arrived):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "stop").touch()
    handler = signal.getsignal(signal.SIGTERM)
    with stopping_cleanly(tmp_path):
        assert not stop_is_asked(tmp_path)
    assert arrived == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_outside_of_ray_train_no_node_is_leaving():
    assert leaving_nodes() == frozenset()
