r"""Reads the JSON form of a reply: the one object in it that has all parts, with any text around it.

Teachers write things that no JSON parser accepts but that can be read in only one way: line ends inside texts, a comma
after the last value, `\(` and `\'`. LaTeX is the hardest case, because `\frac` is a valid escape (a form feed) followed
by "rac". No text contains a form feed or a backspace on purpose. A command that begins with n, r or t is recognised by
its name; if its rest may be a word ("to", "nu"), it counts only between dollar signs.
"""

import ast
import json
import re
import warnings
from itertools import chain
from typing import Any, Self

from operators.reflect.placeholders import is_placeholder
from operators.reflect.reply_headings import CRITIQUE, critique_by_criterion
from operators.reflect.reply_parts import Parsed, Rejected, criterion_named, section_named

MOST_OBJECTS = 50  # opening braces that are tried in one reply
LONGEST_ODD_REPLY = 100_000  # characters; in a longer one only valid JSON is looked for
DEEPEST = 4  # levels of nested objects in which parts are looked for

_OBJECT = re.compile(r"\{\s*[\"'“”]")
# Only for a reply that holds no valid object: inside a valid text these would change it.
_MISSPELT = (
    (re.compile(r"([{,]\s{0,99})([A-Za-z_]\w{0,60})(?=\s{0,9}[:：]\s{0,9}\")"), r'\1"\2"'),
    (re.compile(r"(?<=\")\s{0,9}：\s{0,9}(?=[\"\[{])"), ": "),
    (re.compile(r"(?<=[\"\]}])(?=[ \t]{0,99}\n\s{0,99}\"\w[\w ]{0,60}\"\s{0,9}:)"), ","),
)
_TOKEN = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)|\"|\$\$?|,(?=\s*[}\]])", re.DOTALL)
_CLOSES_MATH = re.compile(r"(?:[^\"\\]|\\(?!n\\n).)*?\$", re.DOTALL)  # a price has no second dollar sign behind it
_LETTERS = re.compile(r"[A-Za-z]+")
# Commands whose rest is not a word, so that `\theta` is never read as a tab and "heta".
_SURELY_LATEX = re.compile(
    "nabla|neq|notin|newcommand|newline|nexists|nleq|ngeq|nmid|nparallel|nsubseteq|nonumber|noindent|nolimits|"
    "rho|right|rightarrow|Rightarrow|rightharpoonup|rangle|rceil|rfloor|rvert|rVert|real|"
    "text|textbf|textit|textrm|texttt|textsc|tfrac|theta|times|triangle|triangleq|tilde|therefore|thinspace"
)
_MAYBE_LATEX = re.compile("ne|neg|ni|not|nu|tan|tanh|tau|to|top|ref|rm|rule")


_STRING_OR_COMMENT = re.compile(r"\"(?:[^\"\\]|\\.)*\"|//[^\n]*|/\*.*?\*/|(?<=[\s,{])#[^\n]*", re.DOTALL)
_LONG_STRING = re.compile(r"\"{3}(.*?)\"{3}", re.DOTALL)
_BARE_QUOTE = re.compile(r"(?<!\\)\"")
# Names in an object that stands for one text, and in an object about one criterion.
_TEXT_NAMES = frozenset({"text", "content", "value", "answer", "response", "instruction", "output"})
_CRITERION_NAMES = frozenset({"criterion", "criteria", "name", "aspect", "category", "dimension"})


class _Number(float):
    """A number with a point or an exponent, and its digits as they were written."""

    def __new__(cls, digits: str) -> Self:
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    digits: str


class _Pairs(list[tuple[str, Any]]):
    """The members of one object, in order; a name may occur twice."""


def read_json(reply: str, criteria: dict[str, str], sections: dict[str, str]) -> Parsed | Rejected:
    """Read the one complete object of `reply`; its texts are not cleaned yet."""
    objects = _objects(reply)
    readings = [_read_object(pairs, criteria, sections) for pairs in objects]
    complete = [reading for reading in readings if isinstance(reading, Parsed)]
    if not complete:
        whole = _read_object(_Pairs(chain(*objects)), criteria, sections)  # the critique in one, the text in another
        if isinstance(whole, Parsed):
            return whole
        return next((reading for reading in readings if isinstance(reading, Rejected)), Rejected("no_json"))
    written = [reading for reading in complete if not any(is_placeholder(text) for text in reading.texts.values())]
    distinct = {json.dumps(reading.texts, sort_keys=True): reading for reading in written or complete}
    return Rejected("several_objects") if len(distinct) > 1 else next(iter(distinct.values()))


def mended(text: str) -> str:
    r"""JSON source with `\frac`, `\(` and the like escaped, and without commas before a closing bracket.

    Escapes that JSON defines stay, except those that begin a LaTeX command.
    """
    in_string = math = False

    def restore(match: re.Match[str]) -> str:
        nonlocal in_string, math
        found = match.group()
        if found == '"':
            in_string, math = not in_string, False
        elif found == ",":
            return found if in_string else ""
        elif found[0] == "$":
            math = not math and bool(_CLOSES_MATH.match(text, match.end()))
        elif in_string and len(found) == 2:
            math = found[1] in "([" or (math and found[1] not in ")]")
            return _restored(found[1], text, match.end(), math)
        return found

    return _TOKEN.sub(restore, text)


def _restored(letter: str, text: str, end: int, math: bool) -> str:
    if letter in '"\\/':
        return f"\\{letter}"
    if letter == "'":
        return letter
    letters = _LETTERS.match(text, end - 1)
    command = letters.group() if letters else ""
    is_latex = _SURELY_LATEX.fullmatch(command) or (math and _MAYBE_LATEX.fullmatch(command))
    if letter in "nrt" and not is_latex:
        return f"\\{letter}"
    if letter in "bf" and len(command) == 1:
        return f"\\{letter}"
    return f"\\\\{letter}"


def _objects(reply: str) -> list[_Pairs]:
    """All objects in `reply` that are not inside another one."""
    source = mended(reply)
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, strict=False, parse_float=_Number)
    found, place = [], 0
    for _ in range(MOST_OBJECTS):
        begin = _OBJECT.search(source, place)
        if begin is None:
            break
        try:
            value, place = decoder.raw_decode(source, begin.start())
        except (ValueError, RecursionError):  # also a number of thousands of digits
            place = begin.start() + 1
            continue
        found.append(value)
    if found or len(reply) > LONGEST_ODD_REPLY:
        return found
    return (
        _quoted_object(source, decoder)
        or _unclosed_object(source, decoder)
        or _object_of_python(reply)
        or _commented_object(source, decoder)
        or _long_string_object(reply, decoder)
        or _misspelt_object(source, decoder)
    )


def _quoted_object(source: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    """The object inside a JSON text: some teachers encode their reply twice."""
    try:
        value = decoder.decode(source.strip())
        value = decoder.decode(mended(value)) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return []
    return [value] if isinstance(value, _Pairs) else []


def _unclosed_object(source: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    """The object whose last text is complete, but whose closing bracket is missing."""
    begin = _OBJECT.search(source)
    if begin is None or not source.rstrip("` \n").endswith('"'):
        return []
    try:
        value = decoder.decode(source[begin.start() :].rstrip("` \n") + "}")
    except (ValueError, RecursionError):
        return []
    return [value]


def _commented_object(source: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    """The object with comments between its members."""
    text = _STRING_OR_COMMENT.sub(lambda found: found.group() if found.group()[0] == '"' else "", source)
    return [] if text == source else _first_object(mended(text), decoder)


def _long_string_object(reply: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    """The object with texts between three quotes."""
    text = _LONG_STRING.sub(lambda found: '"' + _BARE_QUOTE.sub(r"\"", found[1]) + '"', reply)
    return [] if text == reply else _first_object(mended(text), decoder)


def _first_object(source: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    begin = _OBJECT.search(source)
    try:
        return [decoder.raw_decode(source, begin.start())[0]] if begin else []
    except (ValueError, RecursionError):
        return []


def _misspelt_object(source: str, decoder: json.JSONDecoder) -> list[_Pairs]:
    """The object with other marks around its names and texts, names without marks, or no commas between lines."""
    begin = re.search(r"\{\s*[\"“\w]", source)
    if begin is None:
        return []
    source = source[begin.start() :]
    if '"' not in source:
        source = source.translate(str.maketrans("“”„", '"""'))
    for pattern, right in _MISSPELT:
        source = pattern.sub(right, source)
    try:
        return [decoder.raw_decode(source)[0]]
    except (ValueError, RecursionError):
        return []


def _object_of_python(reply: str) -> list[_Pairs]:
    """The object written as a Python dict, with single quotes; one that JSON cannot hold, as with a set, is code."""
    begin, end = reply.find("{'"), reply.rfind("}")
    if not 0 <= begin < end:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            value = json.dumps(ast.literal_eval(reply[begin : end + 1]))
        value = json.loads(value, object_pairs_hook=_Pairs)  # no _Number: the digits as they were written are lost
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return []
    return [value] if isinstance(value, _Pairs) else []


def _read_object(pairs: _Pairs, criteria: dict[str, str], sections: dict[str, str]) -> Parsed | Rejected:
    members = _members(pairs, DEEPEST)
    as_sections = [(section_named(key, sections), value) for key, value in members]
    as_criteria = [(criterion_named(key, criteria), value) for key, value in members]
    texts = {name: [_only_text(value, name) for value in _values(name, as_sections)] for name in sections}
    critique = {name: [_said(value) for value in _values(name, as_criteria)] for name in criteria}
    if not any(critique.values()):
        in_words = _critique_in_words(members, criteria) or _critique_in_a_list(members, criteria)
        critique |= {name: [said] for name, said in in_words.items()}
    if any(len({value if isinstance(value, str) else None for value in values}) > 1 for values in texts.values()):
        return Rejected("repeated_heading")
    if any(not values or not isinstance(values[0], str) for values in (*texts.values(), *critique.values())):
        return Rejected("missing_section")
    return Parsed(
        {name: "\n".join(map(str, values)) for name, values in critique.items()},
        {name: values[0] for name, values in texts.items()},
    )


def _critique_in_words(members: list[tuple[str, Any]], criteria: dict[str, str]) -> dict[str, str]:
    """The critique by criterion if one member holds it as lines such as "helpfulness: fine"."""
    said = [_said(value) for key, value in members if key.casefold() in CRITIQUE]
    return critique_by_criterion(said[0], criteria) if len(said) == 1 and isinstance(said[0], str) else {}


def _critique_in_a_list(members: list[tuple[str, Any]], criteria: dict[str, str]) -> dict[str, Any]:
    """The critique by criterion from objects such as `{"criterion": "accuracy", "comment": "fine"}`."""
    found: dict[str, Any] = {}
    listed = [value for _, value in members if isinstance(value, list) and not isinstance(value, _Pairs)]
    for each in chain(*listed):
        names = [value for key, value in each if key.casefold() in _CRITERION_NAMES] if isinstance(each, _Pairs) else []
        named = criterion_named(names[0], criteria) if len(names) == 1 and isinstance(names[0], str) else None
        if named is None or named[0] in found:
            continue
        found[named[0]] = _said(_Pairs((key, value) for key, value in each if value is not names[0]))
    return found


def _values(name: str, named: list[tuple[tuple[str, bool] | None, Any]]) -> list[Any]:
    """Values of the members with this name; another spelling of it counts only if no member has the exact name."""
    exact = [value for found, value in named if found == (name, True)]
    return exact or [value for found, value in named if found == (name, False)]


def _only_text(value: Any, name: str) -> Any:
    """A text; a list or an object of one text counts as what it holds, and a number as an answer."""
    if isinstance(value, list) and not isinstance(value, _Pairs) and len(value) == 1:
        value = value[0]
    if isinstance(value, _Pairs) and len(value) == 1 and value[0][0].casefold() in {name, *_TEXT_NAMES}:
        value = value[0][1]
    if name.endswith("response") and isinstance(value, int | _Number) and not isinstance(value, bool):
        return value.digits if isinstance(value, _Number) else str(value)
    return value


def _said(value: Any) -> Any:
    """What is said about a criterion, also as `{"score": 4, "comment": "fine"}` or as a list of remarks."""
    values = [each for _, each in value] if isinstance(value, _Pairs) else value
    if not isinstance(values, list):
        return values
    texts = [each for each in values if isinstance(each, str) and each.strip()]
    return "\n".join(texts) if texts else None


def _members(pairs: _Pairs, depth: int) -> list[tuple[str, Any]]:
    """The members of an object and of the objects within it."""
    members = list(pairs)
    if depth > 1:
        for _, value in pairs:
            within = value if isinstance(value, list) and not isinstance(value, _Pairs) else [value]
            for each in within:
                if isinstance(each, _Pairs):
                    members += _members(each, depth - 1)
    return members
