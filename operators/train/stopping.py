"""Handles machines that are taken during training: the step ends, then a checkpoint.

Driver: a scheduler sends it SIGTERM before it takes the machine. The driver writes a file where every worker can see
it. Rank 0 looks for it once per step, and all workers learn of it through the sums that they exchange anyway. A second
signal is not held back.

Node of a worker: Ray is told to drain it (`ray drain-node`, or a cloud's notice through the autoscaler), and tells all
workers. Training goes on until the node is gone, and then begins anew at that checkpoint on the nodes that are left.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from operators.files.atomic import put_file
from operators.files.copies import delete, exists
from operators.train.job import CHECKPOINTS

STOP = "stop"
_LOG = logging.getLogger(__name__)


def stop_is_asked(folder: Path | str) -> bool:
    """Whether the driver of the training in `folder`, a path or a URI, was told to stop."""
    return exists(f"{folder}/{CHECKPOINTS}/{STOP}")


def leaving_nodes() -> frozenset[str]:
    """Ids of nodes with workers of this training that Ray drains; Ray learns of them within five seconds.

    `ray.train.get_preemption_info` says the same, but makes all workers wait for each other at each call.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        told = get_train_context().preemption_context.preemption_info
    except RuntimeError:  # not in a worker of Ray Train
        return frozenset()
    return frozenset(told.preempted_node_ids) if told else frozenset()


class NodeWarnings:
    """Tells of each leaving node once, so that one checkpoint is made for it."""

    def __init__(self) -> None:
        self._known = frozenset[str]()

    def is_new(self) -> bool:
        """Whether Ray says for the first time that a node of the training is leaving."""
        new = leaving_nodes() - self._known
        if new:
            _LOG.warning("train: a checkpoint is due, because nodes are leaving: %s", ", ".join(sorted(new)))
        self._known |= new
        return bool(new)


@contextmanager
def stopping_cleanly(folder: Path | str) -> Iterator[None]:
    """Hold SIGTERM back inside the context, and deliver it afterwards; only in the main thread."""
    asked = f"{folder}/{CHECKPOINTS}/{STOP}"
    delete(asked)  # a new run is a new attempt
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: FrameType | None) -> None:
        signal.signal(number, before)
        put_file(asked, "")

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if exists(asked):
            os.kill(os.getpid(), signal.SIGTERM)
