"""The parsed form of a reply, and how names in it are recognised in different spellings."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

SYMBOL = "[\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\ufe0f\U0001f300-\U0001faff]"  # arrows, ticks, emojis
OF_WHAT = r"(?:[ _](?:of )?(?:the |your )?(?:\w+ )?(?:answer|response|reply|instruction|text|document|output))"

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORD = re.compile(r"[^\W_]+")
_KEPT_CHARS = 100
_PLURAL = 3  # letters; a shorter word keeps its s
# Words that a teacher may add to the name of a criterion without changing its meaning.
_FILLER = re.compile(
    "a|an|and|any|for|in|instruction|involved|is|its|of|or|overall|required|response|answer|task|the|to|topic"
)
_FRESH = frozenset(
    ["better", "new", "improved", "revised", "rewritten", "updated", "refined", "enhanced", "optimized", "optimised",
     "corrected", "polished"]
)  # fmt: skip
_NOUNS = {"response": frozenset({"response", "answer"}), "instruction": frozenset({"instruction"})}
_ARTICLES = frozenset({"a", "an", "the", "my", "your"})
_TO_WHAT = [("to", "the", "instruction"), ("to", "the", "question"), ("to", "the", "prompt")]


@dataclass(frozen=True)
class Parsed:
    """A reply that was read: criterion -> what the teacher said about it, and reply property -> rewritten text."""

    critique: dict[str, str]
    texts: dict[str, str]


@dataclass(frozen=True)
class Rejected:
    """A reply that cannot be used; `reason` is a word that is counted and shown."""

    reason: str


def criterion_named(name: str, criteria: Iterable[str]) -> tuple[str, bool] | None:
    """The criterion that `name` means, and whether it is the exact name; None if that is not clear.

    Case, plurals and separators are ignored; fillers may be added ("Ambiguity of the instruction"), and the end of a
    long name may be missing ("Complexity").
    """
    found = _words(name)
    if not found:
        return None
    near = []
    for criterion in criteria:
        wanted = _words(criterion)
        if found == wanted:
            return criterion, True
        shorter, longer = sorted((found, wanted), key=len)
        added = found[len(wanted) :] if longer is found else ()
        if longer[: len(shorter)] == shorter and all(_FILLER.fullmatch(word) for word in added):
            near.append(criterion)
    return (near[0], False) if len(near) == 1 else None


def section_named(name: str, sections: dict[str, str]) -> tuple[str, bool] | None:
    """The reply property that `name` means, and whether it is its exact name or heading; None if it is another name.

    "Improved response" means `better_response`: one of a few adjectives and the section's noun.
    """
    found = _words(name)
    for key, heading in sections.items():
        if found in (_words(key), _words(heading)):
            return key, True
    if found[:1] and found[0] in _ARTICLES:
        found = found[1:]
    if found[-3:] in _TO_WHAT:
        found = found[:-3]
    return _by_noun(found[1], sections) if len(found) == 2 and found[0] in _FRESH else None


def noun_named(name: str, sections: dict[str, str]) -> tuple[str, bool] | None:
    """The same for a section's noun alone: "Answer" may mean `better_response`."""
    found = _words(name)
    return _by_noun(found[0], sections) if len(found) == 1 else None


def _by_noun(word: str, sections: dict[str, str]) -> tuple[str, bool] | None:
    for key in sections:
        if word in _singular(_NOUNS.get(key.rpartition("_")[2], frozenset())):
            return key, False
    return None


def _words(name: str) -> tuple[str, ...]:
    """Cached, because all replies of a stage have the same few names; a paragraph in place of a name is not cached."""
    return _words_of_name(name) if len(name) <= _KEPT_CHARS else _words_of_name.__wrapped__(name)


@lru_cache(maxsize=4096)
def _words_of_name(name: str) -> tuple[str, ...]:
    words = tuple(_stem(word) for word in _WORD.findall(_CAMEL.sub(" ", name).casefold()))
    return words[1:] if words and words[0].isdigit() else words


def _singular(words: Iterable[str]) -> set[str]:
    return {_stem(word) for word in words}


def _stem(word: str) -> str:
    return word.removesuffix("s") if len(word) > _PLURAL else word
