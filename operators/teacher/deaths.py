"""Decides what to do with the calls that were on an engine when it died: pure logic, no engine, no Ray.

An engine dies because its machine was taken away or ran out of memory, or because one call crashes it. Its calls are
divided into quarters, and each quarter in turn gets the next engine for itself. So a lost machine costs four rounds at
a quarter of the concurrency, and a call that crashes engines is found after log4(calls) further deaths. If the engine
dies again, the quarter that it held is divided too, and waits behind the other quarters. A call that was alone at two
deaths is given up.
"""

from collections import Counter
from dataclasses import dataclass

PARTS = 4  # a round costs one reply's time, a death costs an engine start: 4 is near the best if these are comparable
DEADLY_AFTER = 2  # deaths while a call was alone on the engine; one may be chance
MAX_DEADLY = 3  # deadly calls in a row without an answered call; with more, the engine is to blame
CRASHES = "the engine crashes on every call; look into its log and at its memory"


@dataclass(frozen=True)
class Verdict:
    """How to continue after a death.

    Attributes:
        groups: keys of calls; each group in turn gets the engine for itself.
        deadly: keys of calls that must not be made again.
        closed: why no further call may be made; "" if calls may be made.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    deadly: frozenset[str] = frozenset()
    closed: str = ""


class Deaths:
    """Remembers the deaths of one stage's engines, and decides."""

    def __init__(self) -> None:
        self.count = 0
        self._alone: Counter[str] = Counter()  # deaths while this call was alone
        self._deadly_in_a_row = 0
        self._any_survived = False
        self._died_before_any_survived: list[set[str]] = []

    def survived(self) -> None:
        """A call was answered."""
        self._deadly_in_a_row, self._any_survived = 0, True
        self._died_before_any_survived = []

    def died(self, keys: list[str]) -> Verdict:
        """An engine died with these calls on it; returns how to continue.

        Args:
            keys: of the calls; at least one.
        """
        self.count += 1
        if len(keys) == 1:
            return self._died_alone(keys[0])
        if self._is_engines_fault(set(keys)):
            return Verdict(closed=CRASHES)
        size = -(-len(keys) // PARTS)
        return Verdict(tuple(tuple(keys[start : start + size]) for start in range(0, len(keys), size)))

    def _died_alone(self, key: str) -> Verdict:
        self._alone[key] += 1
        if self._alone[key] < DEADLY_AFTER:
            return Verdict(closed=CRASHES) if self._is_engines_fault({key}) else Verdict(((key,),))
        self._deadly_in_a_row += 1
        blame_engine = not self._any_survived or self._deadly_in_a_row > MAX_DEADLY
        return Verdict(closed=CRASHES) if blame_engine else Verdict(deadly=frozenset({key}))

    def _is_engines_fault(self, keys: set[str]) -> bool:
        """Whether two groups without a common call died before any call was answered."""
        if self._any_survived:
            return False
        self._died_before_any_survived.append(keys)
        return any(keys.isdisjoint(other) for other in self._died_before_any_survived)
