"""Measures the memory of a stage: what the run's own processes hold at the peak.

This includes what earlier stages left (Ray and its object store, idle workers), because all of it has to fit. Other
programs of the machine do not count, if this process started Ray. On a cluster that others started, Ray's processes
are not this one's descendants; then it is the machine's used memory, minus what was used before the process began.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

SAMPLE_EVERY_S = 1.0
MIB = 1 << 20
_RAYLET = "raylet"  # the process of Ray that starts all workers


def used_mib() -> int:
    """Memory of this machine that is not available, over all processes, in MiB."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available) // MIB


USED_BEFORE_MIB = used_mib()


def own_mib() -> int | None:
    """Memory of this process and its descendants in MiB, or None if no raylet is among them.

    Anonymous memory of all, and shared memory once: every process that reads Ray's object store maps all of it. Pages
    of files do not count, because the kernel can drop them.
    """
    processes = family()
    if not any(_name_of(process) == _RAYLET for process in processes):
        return None
    held = [_held_kib(process.pid) for process in processes]
    return (sum(anonymous for anonymous, _ in held) + max(shared for _, shared in held)) // 1024


def family() -> list[psutil.Process]:
    """This process and its descendants."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


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
        own = own_mib()
        self.peak_mib = max(self.peak_mib, used_mib() - USED_BEFORE_MIB if own is None else own)


def _name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:  # it has ended
        return ""


def _held_kib(pid: int) -> tuple[int, int]:
    """Anonymous and shared memory of a process in KiB; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = dict(line.partition(":")[::2] for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    anonymous, shared = (int(values.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem"))
    return anonymous, shared
