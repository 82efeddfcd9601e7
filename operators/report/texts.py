"""Makes hostile text safe to show, compares two texts word by word, and formats numbers for people."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

# Control characters, direction overrides, zero-width line joiners and the invisible tag block: a reader cannot see
# them, or they make text look like something else. Joiners of scripts and emoji stay.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
# A word or a run of punctuation with the space after it, or the space at the beginning of the text.
WORD = re.compile(r"\w+\s*|[^\w\s]+\s*|\s+")

MAX_DIFF_WORDS = 1200  # comparing is quadratic; longer texts are shown side by side
MIN_KEPT = 0.4  # share of the shorter text's words; with less in common, the texts are shown side by side
MIN_KEPT_WORDS = 3  # a shorter run between two changes is shown as changed: whole phrases read better

NOTHING = "–"
KEPT, DELETED, INSERTED = "kept", "deleted", "inserted"


@dataclass(frozen=True)
class _Change:
    """A part of both texts: the same words (`kept`), or the words before and after a change."""

    kept: bool
    before: list[str]
    after: list[str]


def visible(text: str) -> str:
    """Replace invisible characters by their names: a direction override becomes `[U+202E]` and has no effect."""
    return INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


def word_diff(before: str, after: str) -> tuple[tuple[str, str], ...]:
    """The parts (kind, text) of both texts in reading order, compared by words without the space after each word.

    Empty if the texts have too little in common, or are too long, to be shown as a diff.
    """
    old, new = WORD.findall(before), WORD.findall(after)
    if max(len(old), len(new)) > MAX_DIFF_WORDS:
        return ()
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    changes = _joined([_Change(tag == "equal", old[a:b], new[c:d]) for tag, a, b, c, d in matcher.get_opcodes()])
    num_kept = sum(len(change.after) for change in changes if change.kept)
    return tuple(_parts(changes)) if num_kept >= MIN_KEPT * min(len(old), len(new)) else ()


def words(name: object) -> str:
    """A name of the code as words: `quarantined:too_long` becomes `quarantined: too long`."""
    return str(name).replace("_", " ").replace(":", ": ")


def count(value: float | None) -> str:
    """A whole number with separators; a dash where there is none."""
    return NOTHING if value is None else f"{value:,.0f}"


def decimal(value: float | None, places: int = 3) -> str:
    """A number with a fixed number of decimals; a dash where there is none."""
    return NOTHING if value is None else f"{value:,.{places}f}"


def short(value: float | None) -> str:
    """A number with four significant digits; a dash where there is none."""
    return NOTHING if value is None else f"{value:,.4g}"


def signed(value: float | None, places: int = 3) -> str:
    """A difference with its sign, which may be a typographic minus; a dash where there is none."""
    return NOTHING if value is None else f"{value:+.{places}f}".replace("-", "−")


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole in per cent; a dash where there is none."""
    return NOTHING if part is None or not whole else f"{100 * part / whole:.0f}\u202f%"


def duration(seconds: float | None) -> str:
    """Seconds as seconds, minutes or hours; a dash where there are none."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _joined(changes: list[_Change]) -> list[_Change]:
    """Merge short kept runs between two changes into the change, then merge neighbours of the same kind."""

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
