"""Time since a thing was first seen does not depend on the machine's clock."""

import pytest

from flows.first_seen import FirstSeen


def test_seconds_count_from_the_first_look_at_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("flows.first_seen.time.monotonic", lambda: now)
    monkeypatch.setattr("flows.first_seen.time.time", lambda: pytest.fail("a clock that may be set"))
    seen = FirstSeen()
    assert seen.seconds("a", 1) == 0
    now = 15.0
    assert (seen.seconds("a", 1), seen.seconds("b", 1)) == (5, 0)
    assert seen.seconds("a", 2) == 0, "it changed"
    now = 16.0
    assert (seen.seconds("a", 2), seen.seconds("b", 1)) == (1, 1)
