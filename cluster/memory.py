"""How much memory a stage took: the peak of the machine's used memory while it ran, above what was used before."""

import threading
from types import TracebackType
from typing import Self

import psutil

SAMPLE_EVERY_S = 0.5
MIB = 1 << 20


def used_mib() -> int:
    """Memory of this machine that is not available, all processes together."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available) // MIB


class PeakMemory:
    """Context manager; `peak_mib` is the driver's machine only, so on a cluster it covers the head node."""

    def __init__(self) -> None:
        self.peak_mib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._before_mib = 0

    def __enter__(self) -> Self:
        self._before_mib = used_mib()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self.peak_mib = max(self.peak_mib, used_mib() - self._before_mib)
