"""Hostile text made safe to look at, and the word-level difference of two texts."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

# Control characters, direction overrides, zero-width joints of lines and the invisible tag block: what a reader cannot
# see, or what makes text look like something else. Joiners of scripts and emoji stay.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
# A word or a run of punctuation with the space behind it, or the space at the head of the text.
WORD = re.compile(r"\w+\s*|[^\w\s]+\s*|\s+")
# Credentials inside an address, such as s3://key:secret@host or ...?token=...
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])([^=&\s]+)=[^&\s]+")

MAX_DIFF_WORDS = 1200  # comparing is quadratic; longer texts are shown side by side
MIN_KEPT = 0.4  # of the shorter text's words; below it a diff is confetti, and the texts are shown side by side
MIN_KEPT_WORDS = 3  # a shorter run between two changes is shown as changed: whole phrases read better

KEPT, DELETED, INSERTED = "kept", "deleted", "inserted"


@dataclass(frozen=True)
class _Change:
    """A stretch of both texts: the same words (`kept`) or what stood there before and after."""

    kept: bool
    before: list[str]
    after: list[str]


def visible(text: str) -> str:
    """Name what cannot be seen: a direction override becomes `[U+202E]` and turns nothing round."""
    return INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


def redacted(text: str) -> str:
    """Take user, password and query values out of addresses."""
    return CREDENTIALS.sub(lambda found: f"{found[1]}=…" if found[1] else "…", text)


def word_diff(before: str, after: str) -> tuple[tuple[str, str], ...]:
    """The parts (kind, text) of both texts in reading order, compared by words; the space behind a word does not count.

    Empty where the texts share too little, or are too long, to be interleaved.
    """
    old, new = WORD.findall(before), WORD.findall(after)
    if max(len(old), len(new)) > MAX_DIFF_WORDS:
        return ()
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    changes = _joined([_Change(tag == "equal", old[a:b], new[c:d]) for tag, a, b, c, d in matcher.get_opcodes()])
    num_kept = sum(len(change.after) for change in changes if change.kept)
    return tuple(_parts(changes)) if num_kept >= MIN_KEPT * min(len(old), len(new)) else ()


def _joined(changes: list[_Change]) -> list[_Change]:
    """Take short kept runs between two changes into the change, then merge neighbours of the same kind."""

    def is_kept(position: int) -> bool:
        inside = 0 < position < len(changes) - 1
        return changes[position].kept and not (inside and len(changes[position].after) < MIN_KEPT_WORDS)

    merged = []
    for kept, run in groupby(range(len(changes)), key=is_kept):
        stretch = [changes[position] for position in run]
        merged.append(
            _Change(
                kept,
                [word for change in stretch for word in change.before],
                [word for change in stretch for word in change.after],
            )
        )
    return merged


def _parts(changes: list[_Change]) -> list[tuple[str, str]]:
    parts = []
    for change in changes:
        if change.kept:
            parts.append((KEPT, "".join(change.after)))
            continue
        parts += [
            (kind, "".join(words)) for kind, words in ((DELETED, change.before), (INSERTED, change.after)) if words
        ]
    return parts
