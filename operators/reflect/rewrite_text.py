r"""Cleans the rewritten text of a section, or refuses the reply.

Everything that certainly does not belong to the text is removed: a label or "Here is a better answer:" before it,
"[End]" or a note about the rewriting after it, the closing fence of a reply in a fence, and line ends written as `\n`.
If something may or may not be part of the text, the reply is refused: the student must not learn the reply's form.
"""

import re

import yaml

from operators.outside_text import control_character, replace_surrogates
from operators.reflect.placeholders import is_excuse, is_placeholder, leaves_out
from operators.reflect.remarks import (
    criteria_of,
    ends_with_remark,
    goes_on,
    opens_with_remark,
    thinks_aloud,
    without_note,
    without_opening,
)
from operators.reflect.reply_parts import OF_WHAT, SYMBOL, Rejected, section_named
from operators.thoughts import (
    INVISIBLE,
    begins_with_thoughts,
    holds_thoughts,
    reply_after_thoughts,
    without_thoughts,
)

LONGEST_LABEL = 120  # characters of a line in which a name is searched
LAST_CHARS = 80  # of a text, in which to look for an end or a control token

_RULE = re.compile(r"\s*(?:-{3,}|\*{3,}|={3,})?\s*")  # a line of Markdown between parts, or an empty one
_LABEL = re.compile(
    rf"\A(?:[>*_#`\"“ \t-]|{SYMBOL})*(?:\d{{1,2}}[.)] )?(?P<open>[\[【［]?)[ \t]*(?P<name>[^\W\d_][\w ]{{0,40}}?)[ \t]*"
    r"(?P<close>[\]】］]?)"
    r"(?P<bold>[*_`\"”]*)[ \t]*(?:\([^()\n]{0,40}\)[*_ \t]*)?"
    r"(?P<mark>[:：]|[-=]>|[→⇒]|[-–—](?=\s)|(?=\n))[ \t]*[*_]*[ \t]*"
    r"(?P<line_end>\n(?:[ \t]*[-=]{3,}[ \t]*\n)?)?"
)
_BARE_HEADING = re.compile(r"\A[ \t]*[*_#\[]*(?:Better|New|Improved|Revised) (?:Answer|Response|Instruction)\b")
_YAML_BLOCK = re.compile(r"\|[-+]?[ \t]*\n|>[-+]?[ \t]*\n[ \t]")
_CONTROL_TOKEN = re.compile(r"(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>|\[/INST\])\Z")
_TURN = re.compile(r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\A[^<]*</s>")
_LAST_END = re.compile(
    rf"(?:\s*(?:\*\*|__)?[<\[【［]\s*/?\s*end{OF_WHAT}?[!.]?\s*[>\]】］](?:\*\*|__)?[.\s]*|"
    rf"\n[ \t*_#=~-]*end{OF_WHAT}[ \t*_#=~.!-]*)\Z",
    re.IGNORECASE,
)
_ARROWS = ("->", "=>", "→", "⇒")
_LABELS = ("answer", "response", "instruction")  # "Output:" and "Reply:" may begin what was asked for
_NOUNS = ("answer", "response", "reply", "instruction", "output")
_TAG = re.compile(r"<(?P<close>/?)(?P<name>[A-Za-z][\w -]{0,40}?)(?P<code> [0-9a-f]{8})?>")
_FENCE_OF_PROMPT = re.compile(r"</?[\w -]{1,40} [0-9a-f]{8}>")
_MEMBER = re.compile(r"\"better_(?:response|answer|instruction)\"\s*:")
_TEMPLATE_LINE = re.compile(r"^### (?:instruction|input|response):[ \t]*$", re.IGNORECASE | re.MULTILINE)
_CRITIQUE_LINE = re.compile(
    r"^[^\w\n]{0,20}(?:critique|criticism)[^\w\n]{0,20}$|^[^\w\n]{0,20}\[(?:critique|end)\]",
    re.IGNORECASE | re.MULTILINE,
)
_OTHER_SECTION = re.compile(
    r"^\W{0,4}\[(?:explanation|rationale|reasoning|justification|analysis|evaluation|feedback|improvements|"
    r"(?:summary of )?changes(?: made)?)\]\W{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
_SECTION_CLOSED = re.compile(r"\s*\[/\s*(?P<name>[\w ]{1,40}?)\s*\]\W{0,3}\Z")
_BRACKETED_LINE = re.compile(r"\W*?[\[【［]([^\[\]【】［］]{1,40})[\]】］]\W*$")
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^`\n]*$", re.MULTILINE)
# Commands of LaTeX that begin with n, so that `\nabla` is not read as a line end.
_LATEX_N = (
    "abla|atural|ewline|ewcommand|ewpage|exists|eq|eg|e|geq|leq|less|gtr|mid|ot|otin|olimits|oindent|onumber|"
    "ormalsize|parallel|sim|cong|subseteq|earrow|warrow|u|i|rightarrow|leftarrow"
)
_LITERAL_LINE_END = re.compile(rf"(?<!\\)\\n(?!(?:{_LATEX_N})(?![A-Za-z]))")
_QUOTED = re.compile(
    r"```.*?```|`[^`\n]*`|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\$[^$\n]*\$|"
    r"(?:\A| )\\n(?=[ ,.;)]|$)|\(\\n\)|(?<![A-Za-z])[A-Za-z]:\\\S*|"
    r"(?<=[(=, ])/(?:[^/\s\\]|\\.){1,40}/[gimsuy]*(?=[),;. ]|$)",
    re.DOTALL,
)
_LITERAL_LETTER = re.compile(r"[^\W\d_]\\u00[0-9a-fA-F]{2}")  # `caf\u00e9`; behind other characters it may be code
_ESCAPED_QUOTES = re.compile(r"(?<![\w\\\"])\\\"([^\"\\\n]*)\\\"(?![\w\"])")
_SHOWN = re.compile(r"```.*?```|`[^`\n]*`|\"[^\"\n]*\"|'[^'\n]*'", re.DOTALL)
_PATTERN = re.compile(r"\\[dwsDWS](?![A-Za-z])|\\n\||\|\\n")  # a regular expression, in which `\n` stays
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n[a-z_][\w-]*:(?:[ \t].*)?\n(?:.*\n)*?---[ \t]*(?:\n|\Z)")
_CODE = re.compile(r"[=(){};<>\[\]]|:\s*$|\b(?:return|def|if|else|for|while|import|pass|print)\b")


def clean_reply(reply: str) -> str | Rejected:
    """The whole reply with LF line ends, without invisible marks at its edges and without thoughts before it."""
    text = replace_surrogates(reply).replace("\r\n", "\n").replace("\r", "\n").strip(INVISIBLE + " \t\n")
    text = reply_after_thoughts(_without_control_tokens(text))
    if begins_with_thoughts(text):
        return Rejected("unfinished_thoughts")
    if "\n" not in text and len(_LITERAL_LINE_END.findall(text)) > 1 and not text.lstrip("`").startswith(("{", "json")):
        text = _unescape(text)
    return text


def clean_rewrite(text: str, sections: dict[str, str], criteria: dict[str, str]) -> str | Rejected:
    """One rewritten text without the teacher's additions around it, or the reason why these cannot be separated."""
    text = replace_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")
    if control_character(text):
        return Rejected("control_character")
    text = without_thoughts(_trim(text))
    if holds_thoughts(text) or thinks_aloud(text):
        return Rejected("thoughts_in_text")
    text = _trim(_without_label(_without_tags(text, sections), sections))
    text = _unfolded(_trim(_without_tags(_without_tail(text, sections), sections)))
    restored = _with_line_ends(text)
    if isinstance(restored, Rejected):
        return restored
    reason = _dirt(restored, sections, criteria) if restored else "empty_section"
    return Rejected(reason) if reason else restored


def _trim(text: str) -> str:
    """`text` without empty lines and rules at its edges; a first line of code keeps its indentation."""
    if _FRONT_MATTER.match(text):
        return text.strip(INVISIBLE + " \t\n")
    lines = text.strip(INVISIBLE).split("\n")
    kept = [number for number, line in enumerate(lines) if not _RULE.fullmatch(line)]
    if not kept:
        return ""
    lines = lines[kept[0] : kept[-1] + 1]
    text = "\n".join(lines).rstrip(INVISIBLE + " \t")
    first, later = lines[0], [line for line in lines[1:] if line.strip()]
    indent = first[: len(first) - len(first.lstrip())]
    is_code = bool(_CODE.search(first)) or any(line[:1] in " \t" for line in later)
    return text if is_code and ("\t" in indent or len(indent) > 1) else text.lstrip()


def _unfolded(text: str) -> str:
    """The text of a block of YAML (`|` or `>` and indented lines), if all of `text` is one."""
    if not _YAML_BLOCK.match(text):
        return text
    try:
        value = yaml.safe_load(f"text: {text}")
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    is_one = isinstance(value, dict) and [*value] == ["text"] and isinstance(value["text"], str)
    return _trim(value["text"]) if is_one else text


def _without_control_tokens(text: str) -> str:
    text = text.rstrip()
    while found := _CONTROL_TOKEN.search(text, max(0, len(text) - LAST_CHARS)):
        if found.group() == "</s>" and "<s>" in text:  # struck-out text in HTML
            break
        text = text[: found.start()].rstrip()
    return text


def _without_label(text: str, sections: dict[str, str]) -> str:
    for _ in range(3):
        label = _LABEL.match(text[:LONGEST_LABEL])
        shorter = text[label.end() :] if label and _is_label(label, sections) else without_opening(text)
        if shorter == text:
            break
        text = shorter.strip("\n") if shorter.strip() else ""
    return text


def _is_label(label: re.Match[str], sections: dict[str, str]) -> bool:
    """Whether a first line names its section: "Better answer:", or the noun alone if it cannot belong to the text."""
    if section_named(label["name"], sections):
        return True
    noun = label["name"].casefold()
    if noun not in _LABELS or label["mark"] in _ARROWS or not (label["mark"] or label["bold"]):
        return False
    # "Answer: B" may be what was asked for.
    return noun != "answer" or bool(label["bold"] or label["line_end"])


def _is_section(line: str, sections: dict[str, str]) -> bool:
    """Whether a line begins with "New Answer:", as if another section followed."""
    line = line[:LONGEST_LABEL]
    label = _LABEL.match(line) if ":" in line or "：" in line else None
    return label is not None and label["mark"] in (":", "：") and section_named(label["name"], sections) is not None


def _without_tags(text: str, sections: dict[str, str]) -> str:
    """`text` without a tag of its section around it, such as `<answer>`; other tags belong to the text."""
    first = _TAG.match(text)
    *_, last = [None, *_TAG.finditer(text, max(0, len(text) - LONGEST_LABEL))]
    opens = first is not None and not first["close"] and _is_ours(first, sections)
    closes = last is not None and bool(last["close"]) and last.end() == len(text) and _is_ours(last, sections)
    inner = text[first.end() if opens and first else 0 : last.start() if closes and last else len(text)]
    if opens and closes and first and last and first["name"] == last["name"]:
        other = _TAG.search(inner)
        is_xml = other is not None and not _is_ours(other, sections)  # an answer in XML
        return text if is_xml and not first["code"] else inner.strip("\n")
    if closes and last and f"<{last['name']}" not in text:
        return inner.rstrip()
    return inner.lstrip("\n") if opens and first and f"</{first['name']}" not in text else text


def _is_ours(tag: re.Match[str], sections: dict[str, str]) -> bool:
    return tag["name"].casefold() in _NOUNS or section_named(tag["name"], sections) is not None


def _without_tail(text: str, sections: dict[str, str]) -> str:
    """`text` without "[End]", a last fence that closes nothing, and a note about the rewriting."""
    text = _without_control_tokens(text)
    text = text[:-LAST_CHARS] + _LAST_END.sub("", text[-LAST_CHARS:])
    closed = _SECTION_CLOSED.search(text, max(0, len(text) - LAST_CHARS))
    if closed and section_named(closed["name"], sections):
        text = text[: closed.start()]
    fences = list(_FENCE.finditer(text))
    if len(fences) % 2 and fences[-1].end() == len(text) and fences[-1].group().strip() in ("```", "~~~"):
        text = text[: fences[-1].start()].rstrip()
    return without_note(text)


def _with_line_ends(text: str) -> str | Rejected:
    text = _with_quotes(text)
    bare = _QUOTED.sub("", text) if "\\n" in text or "\\u" in text else ""
    if _LITERAL_LETTER.search(bare):
        return Rejected("literal_line_ends")
    if not _LITERAL_LINE_END.search(bare):
        return text
    is_one_word = len(text.split()) == 1 and text.count("\\n") == 1  # it may be a path
    if "\n" in text or is_one_word or _PATTERN.search(text):
        return Rejected("literal_line_ends")
    return _trim(_unescape(text))


def _with_quotes(text: str) -> str:
    r"""`text` with `"` in place of `\"`, if every quote in it is written so and stands around words."""
    if "`" in text or text.count('"') != text.count('\\"'):
        return text
    restored = _ESCAPED_QUOTES.sub(r'"\1"', text)
    return text if '\\"' in restored else restored


def _unescape(text: str) -> str:
    return _LITERAL_LINE_END.sub("\n", text.replace("\\r\\n", "\\n")).replace('\\"', '"').replace("\\t", "\t")


def _dirt(text: str, sections: dict[str, str], criteria: dict[str, str]) -> str:
    if is_placeholder(text) or is_excuse(text):
        return "placeholder"
    if leaves_out(text):
        return "left_out"
    lines = text.split("\n")
    bracketed = [found[1] for line in lines if len(line) < LONGEST_LABEL and (found := _BRACKETED_LINE.match(line))]
    if (
        _YAML_BLOCK.match(text)
        or _without_label(text, sections) != text
        or _without_tags(_without_tail(text, sections), sections) != text
        or _BARE_HEADING.match(text)
        or _CRITIQUE_LINE.search(text)
        or _MEMBER.search(text)
        or _FENCE_OF_PROMPT.search(text)
        or _TEMPLATE_LINE.search(text)
        or _OTHER_SECTION.search(text)
        or any(section_named(name, sections) for name in bracketed)
        or any(_is_section(line, sections) for line in lines)
    ):
        return "form_in_text"
    if _TURN.search(text) and _TURN.search(_SHOWN.sub("", text)):  # a text about chat templates quotes them
        return "turn_in_text"
    if goes_on(text):
        return "turn_in_text"
    if len(_FENCE.findall(text)) % 2:
        return "open_fence"
    if len(criteria_of(lines, criteria)) > 1:
        return "critique_in_text"
    return "remark_in_text" if opens_with_remark(text) or ends_with_remark(text, criteria) else ""
