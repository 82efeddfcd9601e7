"""The words of a text and its runs of words: the units in which duplicates, contamination and repetition are counted.

Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words; in these scripts every character is a word.
So a text of any script has many small parts, and one edit changes only the runs that contain it.
"""

import hashlib
import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplying by it modulo 2^64 loses no information


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and white space."""
    return _WORD.findall(text.casefold())


def runs(found: list[str], size: int) -> list[str]:
    """All runs of `size` words, each joined by spaces. A shorter text is one run; a text without words has none.

    Args:
        found: as of `words`.
        size: words of a run, at least 1.
    """
    if not found:
        return []
    return [" ".join(found[start : start + size]) for start in range(max(1, len(found) - size + 1))]


def run_hashes(text: str, size: int) -> Hashes:
    """A 64-bit hash of each run of `size` words of `text`, as `runs` gives them; uint64 [runs].

    The hash of a run is a polynomial in the hashes of its words, so that numpy computes all of a text at once.
    """
    found = words(text)
    if not found:
        return np.empty(0, np.uint64)
    each = np.array([_word_hash(word) for word in found], np.uint64)
    width = min(size, len(each))
    windows = np.lib.stride_tricks.sliding_window_view(each, width)
    hashes: Hashes = windows @ _powers(width)
    return hashes


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")


@lru_cache
def _powers(width: int) -> Hashes:
    return np.array([pow(_MULTIPLIER, place + 1, 1 << 64) for place in range(width)], np.uint64)
