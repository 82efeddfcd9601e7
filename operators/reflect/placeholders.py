"""Finds what a teacher writes in place of a text: the form's own dots, "no changes needed", "the rest is the same"."""

import re

LONGEST = 120  # characters of a placeholder
MOST_WORDS = 25  # of an excuse
LONGEST_EXCUSE = 240  # characters of a text that only says that nothing was rewritten

_NOUN = r"(?:answer|response|reply|instruction|prompt|text|rewrite)"
_PLACEHOLDER = re.compile(
    r"[\s\"'“”*_`]*(?:[.…\-–—_?]+|[<\[{(][^<>\[\]{}()\n]{0,80}[>\]})]|\{\{[^{}\n]{0,80}\}\}|n/?a|undefined|todo|tbd|"
    r"(?:your|the|a|an)? ?(?:better|new|improved|revised|rewritten)[ _](?:answer|response|instruction)"
    r"(?: (?:goes )?here| to the (?:instruction|question|prompt))?|\$\{?better_(?:response|instruction)\}?|"
    rf"(?:please )?(?:insert|write|put|add|provide) (?:your|the|a) (?:\w+ ){{0,2}}{_NOUN}(?: here)?|"
    rf"(?:your|the) (?:\w+ )?{_NOUN}(?: goes)? here|"
    r"(?:your|the) (?:answer|response|instruction))[\s\"'“”*_`.…]*",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[\s\"'*_`]*[<\[{(]")
_STANDS_FOR = re.compile(
    r"\b(?:your|answer|response|instruction|text|here|insert|string|sentences?|comment|critique|unchanged|"
    r"no changes?|same)\b|better_|\.\.\.|…",
    re.IGNORECASE,
)
_CHANGE = r"(?:changes?|improvements?|revisions?|rewrit\w+|modifications?|edits?|corrections?|adjustments?)"
_GOOD = (
    r"(?:good|great|fine|correct|accurate|clear|complete|perfect|excellent|adequate|appropriate|sufficient|helpful|"
    r"well[ -]written|satisfactory|concise|as good as)"
)
_NOTHING_CHANGED = re.compile(
    r"[\W_]*(?:n/a\W+(?=\w)|none\W+(?=the )|(?:the )?same\W*\Z)?(?:"
    rf"(?:there (?:is|are) )?(?:no|not any) (?:further |major |significant )?{_CHANGE} "
    r"(?:(?:is|are|was|were) )?(?:needed|necessary|required|made|suggested)\b"
    rf"|no (?:further )?{_CHANGE}\W*\Z"
    rf"|(?:the|this|your) (?:original|given|existing|current|provided) (?:{_NOUN}|one) (?:is|was) "
    rf"(?:already |quite |very |perfectly |sufficiently )*{_GOOD}\b"
    rf"|(?:the )?(?:same|identical|unchanged)(?: {_NOUN})? (?:as|to|from) (?:the )?"
    r"(?:original|above|before|previous|given)\b"
    rf"|(?:see|as|same as|refer to) (?:the )?(?:{_NOUN} )?(?:above|original {_NOUN})\W*\Z"
    rf"|(?:the {_NOUN} (?:is|was|stays|remains) )?unchanged(?: from the original)?\W*\Z"
    rf"|(?:i would not change|nothing (?:needs to|has to|should) be (?:changed|improved))\b"
    r")",
    re.IGNORECASE,
)
_NEEDS_NOTHING = re.compile(
    rf"\b(?:no (?:further )?{_CHANGE} (?:is|are) (?:needed|necessary|required)|"
    rf"(?:needs?|requires?) no (?:further )?{_CHANGE}|"
    rf"(?:does|do) not (?:need|require) (?:any )?(?:further )?{_CHANGE}|"
    rf"(?:cannot|can['’]t|could not) (?:be improved|improve (?:this|the) {_NOUN})|"
    rf"(?:keep|leave|use|retain) the (?:original|existing|same) {_NOUN}|"
    rf"(?:the|this) (?:original )?{_NOUN} (?:is|was) already {_GOOD})\b",
    re.IGNORECASE,
)
_REST = (
    r"(?:the )?(?:rest|remainder|remaining|other|existing|previous|original)(?: \w+){0,4} "
    r"(?:(?:is|are|stays?|remains?|goes|continues?|omitted|left out|here|as)\b|(?:the )?(?:same|unchanged)\b)"
)
_WORDS_OF_GAPS = ("rest", "remain", "other", "existing", "previous", "original", "continu", "truncated", "omitted")
_LEFT_OUT = re.compile(
    rf"^[^\w\n]{{0,12}}[\[(（](?:\.\.\.|…|and )?\s*(?:with |continue with )?{_REST}[^\n]{{0,80}}[\])）][^\w\n]{{0,4}}$"
    r"|[\[(（]\s*(?:\.\.\.|…)?\s*(?:rest|remainder) of (?:the|your|this) (?:original |previous )?\w+"
    r"[^\n\])）]{0,60}[\])）]"
    rf"|^[^\w\n]{{0,4}}(?:\.\.\.|…)\s*[\[(（]?(?:continue with |and )?{_REST}"
    rf"|^[ \t]*(?:#|//|--|/\*|<!--|\{{/\*)\s*(?:\.\.\.|…)\s*(?:{_REST}|(?:rest|remainder) of|"
    r"(?:existing|previous|other) (?:code|methods))"
    r"|(?:\.\.\.|…)\s*[\[(（]continu\w+ [^\n\])）]{0,80}[\])）]\s*\Z"
    r"|[\[(（](?:response |answer |text )?(?:continued|continues|truncated|omitted)(?: for brevity)?[.…]*[\])）]\W*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def is_placeholder(text: str) -> bool:
    """Whether `text` is the form's own "..." or another placeholder for a text that was never written."""
    if len(text) > LONGEST or not _PLACEHOLDER.fullmatch(text):
        return False
    # "[1, 2]" and "(42)" are answers; "[your answer]" is a placeholder.
    return not _BRACKETED.match(text) or bool(_STANDS_FOR.search(text))


def is_excuse(text: str) -> bool:
    """Whether `text` only says that nothing had to be rewritten: "No changes needed.", "Same as the original"."""
    found = _NOTHING_CHANGED.match(text) or _NEEDS_NOTHING.search(text) if len(text) <= LONGEST_EXCUSE else None
    return found is not None and len(text.split()) <= MOST_WORDS


def leaves_out(text: str) -> bool:
    """Whether `text` refers to the original for a part of itself: "[The rest of the answer remains the same.]"."""
    lowered = text.lower()  # two of three texts hold none of the words, and the pattern takes longer than all else
    return any(word in lowered for word in _WORDS_OF_GAPS) and _LEFT_OUT.search(text) is not None
