"""Handles SIGTERM during training, as a scheduler sends it before it takes a machine: the step ends, then a checkpoint.

The driver writes a file where every worker can see it. Rank 0 looks for it once per step, and all workers learn of it
through the sums that they exchange anyway. A second signal is not held back.
"""

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


def stop_is_asked(folder: Path | str) -> bool:
    """Whether the driver of the training in `folder`, a path or a URI, was told to stop."""
    return exists(f"{folder}/{CHECKPOINTS}/{STOP}")


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
