"""Measures the memory of a stage: the machine's peak of used memory, minus what was used before the process began.

This includes what earlier stages left (Ray and its object store, idle workers), because all of it has to fit.
"""

import threading
from types import TracebackType
from typing import Self

import psutil

SAMPLE_EVERY_S = 0.5
MIB = 1 << 20


def used_mib() -> int:
    """Memory of this machine that is not available, over all processes, in MiB."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available) // MIB


USED_BEFORE_MIB = used_mib()


class PeakMemory:
    """Context manager; `peak_mib` covers only the driver's machine, on a cluster the head node."""

    def __init__(self) -> None:
        self.peak_mib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        self.peak_mib = max(self.peak_mib, used_mib() - USED_BEFORE_MIB)
