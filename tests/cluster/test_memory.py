"""The peak of the run's memory is measured while a block of code runs, and only then."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import psutil
import pytest

from cluster import memory
from cluster.memory import MIB, PeakMemory, own_mib

HOLD = "import sys; held = bytearray(b'x' * {size}); print('ready', flush=True); sys.stdin.read()"
SHARE = (
    "import mmap, sys; file = open('{name}', 'r+b'); block = mmap.mmap(file.fileno(), 0); assert block[::4096]; "
    "print('ready', flush=True); sys.stdin.read()"
)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.communicate()


@pytest.fixture
def only_children(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> list[subprocess.Popen[bytes]]:
    """Processes that count in place of this one's family, to which the Ray of other tests may belong."""
    monkeypatch.setattr(memory, "family", lambda: [psutil.Process(child.pid) for child in children])
    return children


def start(code: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def test_samples_are_taken_while_it_is_open_and_none_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SAMPLE_EVERY_S", 0.001)
    monkeypatch.setattr(memory, "USED_BEFORE_MIB", 1000)
    used = iter([*range(1001, 1200)] + [1000] * 100_000)
    monkeypatch.setattr(memory, "own_mib", lambda: None)
    monkeypatch.setattr(memory, "used_mib", lambda: next(used))
    with PeakMemory() as peak:
        while peak.peak_mib < 199:  # the highest sample
            peak._stop.wait(0.001)
    assert peak.peak_mib == 199
    assert not peak._thread.is_alive()


def test_a_process_without_ray_does_not_know_its_own(only_children: list[subprocess.Popen[bytes]]) -> None:
    only_children.append(start(HOLD.format(size=1)))
    assert own_mib() is None


def test_descendants_belong_to_it(children: list[subprocess.Popen[bytes]]) -> None:
    children.append(start(HOLD.format(size=1)))
    assert {os.getpid(), children[0].pid} <= {process.pid for process in memory.family()}


def test_the_memory_of_each_process_counts(
    monkeypatch: pytest.MonkeyPatch, only_children: list[subprocess.Popen[bytes]]
) -> None:
    only_children.append(start(HOLD.format(size=1)))
    monkeypatch.setattr(memory, "_RAYLET", memory._name_of(memory.family()[0]))
    before = own_mib()
    only_children.append(start(HOLD.format(size=100 * MIB)))
    with_another = own_mib()
    assert before is not None
    assert with_another is not None
    assert 100 <= with_another - before <= 130


def test_memory_that_processes_share_counts_once(
    monkeypatch: pytest.MonkeyPatch, only_children: list[subprocess.Popen[bytes]]
) -> None:
    only_children.append(start(HOLD.format(size=1)))
    monkeypatch.setattr(memory, "_RAYLET", memory._name_of(memory.family()[0]))
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as block:
        block.write(b"x" * 100 * MIB)
        block.flush()
        before = own_mib()
        only_children += [start(SHARE.format(name=block.name)) for _ in range(2)]
        after = own_mib()
        assert before is not None
        assert after is not None
        assert 100 <= after - before <= 160, "two interpreters, and one copy of the block"
