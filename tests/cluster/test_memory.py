"""The peak of the machine's memory is measured while a block of code runs, and only then."""

import pytest

from cluster import memory
from cluster.memory import PeakMemory


def test_samples_are_taken_while_it_is_open_and_none_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SAMPLE_EVERY_S", 0.001)
    monkeypatch.setattr(memory, "USED_BEFORE_MIB", 1000)
    used = iter([*range(1001, 1200)] + [1000] * 100_000)
    monkeypatch.setattr(memory, "used_mib", lambda: next(used))
    with PeakMemory() as peak:
        while peak.peak_mib < 199:  # the highest sample
            peak._stop.wait(0.001)
    assert peak.peak_mib == 199
    assert not peak._thread.is_alive()
