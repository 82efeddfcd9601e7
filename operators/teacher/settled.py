"""A set of keys of settled calls, with 8 bytes per key, so that a stage of 10^8 calls can remember all of them."""

import hashlib

import numpy as np
import numpy.typing as npt

FEWEST_SORTED_IN = 65_536  # at least this many keys wait in a set before they are sorted into the array
SHARE_SORTED_IN = (
    1 / 16
)  # share of the array that waits: so the array is copied a few times per doubling, not once per batch

Numbers = npt.NDArray[np.uint64]


class SettledKeys:
    """A set of keys that only grows.

    It stores a hash of 8 bytes per key: among 10^8 keys, two have the same hash with a probability of 0.0003.
    """

    def __init__(self) -> None:
        self._sorted: Numbers = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: str) -> None:
        """Remember a key."""
        self._recent.add(_number(key))
        if len(self._recent) >= max(FEWEST_SORTED_IN, SHARE_SORTED_IN * len(self._sorted)):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent.clear()

    def __contains__(self, key: str) -> bool:
        number = _number(key)
        if number in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
