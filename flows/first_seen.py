"""How long this process has seen something unchanged, by a clock that nobody sets."""

import time
from collections.abc import Hashable

MOST_KEPT = 100_000


class FirstSeen:
    """Remembers when each thing was first seen in its present state."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Hashable, float]] = {}

    def seconds(self, thing: Hashable, state: Hashable = None) -> float:
        """Seconds since the thing was first seen in this state; 0.0 if it is new, or was in another one."""
        now = time.monotonic()
        known = self._seen.get(thing)
        if known is None or known[0] != state:
            if len(self._seen) >= MOST_KEPT:
                self._seen.clear()
            known = self._seen[thing] = (state, now)
        return now - known[1]
