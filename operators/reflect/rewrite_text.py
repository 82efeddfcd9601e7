r"""Cleans the rewritten text of a section, or refuses the reply.

Everything that certainly does not belong to the text is removed: a label or "Here is a better answer:" before it,
"[End]" or a note about the rewriting after it, the closing fence of a reply in a fence, and line ends written as `\n`.
If something may or may not be part of the text, the reply is refused: the student must not learn the reply's form.
"""

import re

from operators.outside_text import control_character, replace_surrogates
from operators.reflect.reply_parts import Rejected, criterion_named, section_named

LONGEST_REMARK = 800  # characters; a longer last paragraph is part of the text
LONGEST_LABEL = 120  # characters of a line in which a name is searched
LAST_CHARS = 80  # of a text, in which to look for an end or a control token

_THINKING = r"(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis)"
_THOUGHT = re.compile(rf"\s*[<\[◁]({_THINKING})[>\]▷].*?[<\[◁]/\1[>\]▷]", re.DOTALL | re.IGNORECASE)
_THINK_TAG = re.compile(r"</?(?:think|thinking|thought|thoughts|scratchpad)>|\[/?THINK\]|◁/?think▷", re.IGNORECASE)
_THINK_OPENS = re.compile(r"\s*(?:<(?:think|thinking|thought|thoughts|scratchpad)>|\[THINK\]|◁think▷)", re.IGNORECASE)
_THINK_CLOSES = re.compile(r"</(?:think|thinking|thought|thoughts|scratchpad)>|\[/THINK\]|◁/think▷", re.IGNORECASE)
_INVISIBLE = "\ufeff\u200b\u200e\u200f\u2060"
_RULE = re.compile(r"\s*(?:-{3,}|\*{3,}|={3,})?\s*")  # a line of Markdown between parts, or an empty one

_FRESH = r"(?:better|improved|revised|rewritten|updated|enhanced|refined|corrected|reworked|new)"
_NOUN = r"(?:answer|response|reply|instruction|prompt|rewrite|rewriting)"
_VERSION = rf"version(?: of (?:the|your|this) (?:original )?{_NOUN})?"
_ABOUT = rf"(?:\w+,? ){{0,5}}{_FRESH},?(?: \w+,?){{0,4}}? (?:{_NOUN}\b[^\n:.]{{0,60}}|{_VERSION})"
_OPENER = r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|understood)\b[ \t]*(?:thing)?[!,.:]*\s*)?"
_ON_CRITIQUE = (
    r"(?:(?:based on|given|considering|following|with|after) (?:the|this|my|your)(?: above)? "
    r"(?:critique|criticism|feedback|evaluation|assessment)\b[^\n:,]{0,40},\s*)?"
)
_PREAMBLE = re.compile(
    rf"\A\W{{0,4}}{_OPENER}{_ON_CRITIQUE}(?:"
    rf"(?:here(?:['’]s| is| are| comes)|below is|this is|the following is) {_ABOUT}"
    r"\W{0,3}(?::|\.?[ \t]*\n|[.!](?=\s))"
    rf"|(?:let me (?:now )?(?:rewrite|revise|improve) (?:the|this|your|my) (?:original )?{_NOUN}\b|"
    r"i(?:['’]ve| have|['’]ll| will)? (?:now )?(?:rewrite|rewrote|rewritten|revise|revised|improve|improved)\b)"
    r"[^\n:]{0,80}:"
    rf"|(?:the|a|my|an) (?:{_FRESH}|more \w+(?:,? (?:and )?(?:more )?\w+){{0,2}}) {_NOUN} "
    r"(?:is|would be|could be|might be)\b[^\n:.]{0,40}:"
    rf"|let me (?:now )?(?:provide|give|offer|write) (?:you )?(?:with )?{_ABOUT}\W{{0,3}}:"
    rf"|here(?:['’]s| is) the {_NOUN},? {_FRESH}\b[^\n:]{{0,60}}:"
    rf"|{_FRESH} version\W{{0,3}}:"
    r")[\s*_]*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\A[>*_#`\"“ \t-]*(?P<open>[\[【［]?)[ \t]*(?P<name>[^\W\d_][\w ]{0,40}?)[ \t]*(?P<close>[\]】］]?)"
    r"[*_`\"”]*[ \t]*(?P<mark>[:：]|[-–—](?=\s)|(?=\n))[ \t]*[*_]*[ \t]*\n?"
)
_BARE_HEADING = re.compile(r"\A[ \t]*[*_#\[]*(?:Better|New|Improved|Revised) (?:Answer|Response|Instruction)\b")
_YAML_BLOCK = re.compile(r"[|>][-+]?[ \t]*\n[ \t]")
_CONTROL_TOKEN = re.compile(r"(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)\Z")
_LAST_END = re.compile(r"\s*(?:\*\*|__)?[<\[【［]\s*/?\s*end\s*[>\]】］](?:\*\*|__)?[.\s]*\Z", re.IGNORECASE)
# A paragraph that calls the text an improved answer.
_ITSELF = re.compile(
    rf"\b(?:the|this|my|your|above) (?:{_FRESH}|original|previous) (?:{_NOUN})\b|"
    r"\b(?:the|this|your|above) (?:critique|criticism)s?\b(?! (?:of|should|must|has)\b)|"
    rf"\b(?:by|with) (?:making )?these (?:changes|improvements), the {_NOUN}\b|"
    rf"\blet me know if\b.{{0,60}}\bthis {_NOUN}\b|"
    rf"\bthis (?:{_NOUN}|version|revision) (?:is|now|has|was|provides?|gives?|addresses|improves?|includes?|adds?|"
    r"corrects?|removes?|offers?|maintains?|keeps?|makes?|clarifies|avoids?|should)\b",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    r"\bi(?:['’]ve| have)? (?:have )?(?:also )?(?:rewritten|rewrote|revised|improved|changed|corrected|"
    r"removed|added|kept|expanded|clarified|shortened|simplified|fixed|made|included|tried)\b",
    re.IGNORECASE,
)
_NAMES_IT = re.compile(
    r"\b(?:answer|response|instruction|rewrite|rewriting|rewritten|revised|criteria|criterion)\b", re.IGNORECASE
)
# "Your response should have 200 words" is part of an instruction.
_ASKS = re.compile(
    r"\b(?:should|must|may|can|cannot|need|needs|ensure|make sure|please|do not|don['’]t)\b", re.IGNORECASE
)
_NOTE = re.compile(r"\n\s*(?P<note>[(\[（【*_]*(?:please )?note\b.*)\Z", re.IGNORECASE | re.DOTALL)
_REMARK = re.compile(
    r"\A\W*(?:critique|criticism|changes|improvements|comment|comments|note|notes)\W{0,4}[:：]", re.IGNORECASE
)
_TOPIC = re.compile(r"\A\s*this (answer|response|instruction|prompt|reply) (?:is|has|was)\b", re.IGNORECASE)
_PRAISE = re.compile(
    rf"\b(?:{_FRESH}|more|clear\w*|accura\w*|concise|complete|helpful|relevant|detail\w*|original|previous|now|directly|"
    r"critique|criteria|criterion|addresse[sd])\b",
    re.IGNORECASE,
)
# An explanation may mention the answer itself: "Explanation: the answer is B because".
_EXPLANATION = re.compile(r"\A\W*(?:explanation|rationale|justification|reason|reasoning)\W{0,4}[:：]", re.IGNORECASE)
_SURELY_REMARK = re.compile(
    r"\A\W*(?:explanation of (?:the )?changes|(?:changes|improvements) made|why this is better|what changed)"
    r"\W{0,4}[:：]",
    re.IGNORECASE,
)
_CRITIQUE_LINE = re.compile(
    r"^[^\w\n]{0,20}(?:critique|criticism)[^\w\n]{0,20}$|^[^\w\n]{0,20}\[(?:critique|end)\]",
    re.IGNORECASE | re.MULTILINE,
)
_BRACKETED_LINE = re.compile(r"\W*?[\[【［]([^\[\]【】［］]{1,40})[\]】］]\W*$")
_BRACKETED_NOTE = re.compile(
    r"\s*[*_]*[(\[（【][*_]*(?:please )?note\s*[*_]*[:：].*[)\]）】]\W*", re.IGNORECASE | re.DOTALL
)
_CRITERION_LINE = re.compile(r"[\s>*_•+–#-]*(?:\d{1,2}[.)]\s*)?[*_]*([^\W\d_][\w /&-]{1,60}?)[*_]*[:：]")
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^`\n]*$", re.MULTILINE)
_PLACEHOLDER = re.compile(
    r"[\s\"'“”*_`]*(?:[.…\-–—_?]+|[<\[{(][^<>\[\]{}()\n]{0,80}[>\]})]|n/?a|undefined|todo|tbd|"
    r"(?:your|the|a|an)? ?(?:better|new|improved|revised|rewritten)[ _](?:answer|response|instruction)"
    r"(?: (?:goes )?here)?|"
    r"(?:your|the) (?:answer|response|instruction)(?: (?:goes )?here)?)[\s\"'“”*_`.…]*",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[\s\"'*_`]*[<\[{(]")
# Commands of LaTeX that begin with n, so that `\nabla` is not read as a line end.
_LATEX_N = (
    "abla|atural|ewline|ewcommand|ewpage|exists|eq|eg|e|geq|leq|less|gtr|mid|ot|otin|olimits|oindent|onumber|"
    "ormalsize|parallel|sim|cong|subseteq|earrow|warrow|u|i|rightarrow|leftarrow"
)
_LITERAL_LINE_END = re.compile(rf"(?<!\\)\\n(?!(?:{_LATEX_N})(?![A-Za-z]))")
_QUOTED = re.compile(
    r"```.*?```|`[^`\n]*`|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\$[^$\n]*\$|"
    r"(?:\A| )\\n(?=[ ,.;)]|$)|\(\\n\)|[A-Za-z]:\\\S*|"
    r"(?<=[(=, ])/(?:[^/\s\\]|\\.){1,40}/[gimsuy]*(?=[),;. ]|$)",
    re.DOTALL,
)
_PATTERN = re.compile(r"\\[dwsDWS](?![A-Za-z])|\\n\||\|\\n")  # a regular expression, in which `\n` stays
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n[a-z_][\w-]*:(?:[ \t].*)?\n(?:.*\n)*?---[ \t]*(?:\n|\Z)")
_CODE = re.compile(r"[=(){};<>\[\]]|:\s*$|\b(?:return|def|if|else|for|while|import|pass|print)\b")


def clean_reply(reply: str) -> str | Rejected:
    """The whole reply with LF line ends, without invisible marks at its edges and without thoughts before it."""
    text = replace_surrogates(reply).replace("\r\n", "\n").replace("\r", "\n").strip(_INVISIBLE + " \t\n")
    text = _without_control_tokens(without_thoughts(text)).lstrip()
    if _THINK_OPENS.match(text):
        return Rejected("unfinished_thoughts")
    opens = re.search(r"[{\[*#]", text)
    closes = _THINK_CLOSES.search(text)  # the chat template may have written the opening tag
    if closes and not _THINK_TAG.search(text[: closes.start()]) and not (opens and opens.start() == 0):
        text = text[closes.end() :].strip()
    if "\n" not in text and len(_LITERAL_LINE_END.findall(text)) > 1 and not text.lstrip("`").startswith(("{", "json")):
        text = _unescape(text)
    return text


def without_thoughts(text: str) -> str:
    """`text` without the complete blocks of thoughts that stand before everything else."""
    while found := _THOUGHT.match(text):
        text = text[found.end() :].strip(_INVISIBLE + "\n")
    return text


def clean_rewrite(text: str, sections: dict[str, str], criteria: dict[str, str]) -> str | Rejected:
    """One rewritten text without the teacher's additions around it, or the reason why these cannot be separated."""
    text = replace_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")
    if control_character(text):
        return Rejected("control_character")
    text = without_thoughts(_trim(text))
    if _THINK_TAG.search(text):
        return Rejected("thoughts_in_text")
    text = _trim(_without_label(text, sections))
    text = _trim(_without_tail(text))
    restored = _with_line_ends(text)
    if isinstance(restored, Rejected):
        return restored
    reason = _dirt(restored, sections, criteria) if restored else "empty_section"
    return Rejected(reason) if reason else restored


def is_placeholder(text: str) -> bool:
    """Whether `text` is the form's own "..." or another placeholder for a text that was never written."""
    if len(text) > LONGEST_LABEL or not _PLACEHOLDER.fullmatch(text):
        return False
    # "[1, 2]" and "(42)" are answers; "[your answer]" is a placeholder.
    return not _BRACKETED.match(text) or bool(
        re.search(r"\b(?:your|answer|response|instruction|text|here|insert)\b|\.\.\.|…", text, re.IGNORECASE)
    )


def _trim(text: str) -> str:
    """`text` without empty lines and rules at its edges; a first line of code keeps its indentation."""
    if _FRONT_MATTER.match(text):
        return text.strip(_INVISIBLE + " \t\n")
    lines = text.strip(_INVISIBLE).split("\n")
    kept = [number for number, line in enumerate(lines) if not _RULE.fullmatch(line)]
    if not kept:
        return ""
    lines = lines[kept[0] : kept[-1] + 1]
    text = "\n".join(lines).rstrip(_INVISIBLE + " \t")
    first, later = lines[0], [line for line in lines[1:] if line.strip()]
    indent = first[: len(first) - len(first.lstrip())]
    is_code = bool(_CODE.search(first)) or any(line[:1] in " \t" for line in later)
    return text if is_code and ("\t" in indent or len(indent) > 1) else text.lstrip()


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
        if label and section_named(label["name"], sections):
            text = text[label.end() :]
        elif found := _PREAMBLE.match(text):
            text = text[found.end() :]
        else:
            break
        text = text.strip("\n") if text.strip() else ""
    return text


def _without_tail(text: str) -> str:
    """`text` without "[End]", a last fence that closes nothing, and a note about the rewriting."""
    text = _without_control_tokens(text)
    text = text[:-LAST_CHARS] + _LAST_END.sub("", text[-LAST_CHARS:])
    fences = list(_FENCE.finditer(text))
    if len(fences) % 2 and fences[-1].end() == len(text) and fences[-1].group().strip() in ("```", "~~~"):
        text = text[: fences[-1].start()].rstrip()
    note = _NOTE.search(text, text.rstrip().rfind("\n\n") if "\n\n" in text else max(0, text.rfind("\n")))
    if note and (_ITSELF.search(note["note"]) or _CHANGED.search(note["note"])):
        text = text[: note.start()]
    return text


def _with_line_ends(text: str) -> str | Rejected:
    bare = _QUOTED.sub("", text) if "\\n" in text else ""
    if not _LITERAL_LINE_END.search(bare):
        return text
    is_one_word = len(text.split()) == 1 and text.count("\\n") == 1  # it may be a path
    if "\n" in text or is_one_word or _PATTERN.search(text):
        return Rejected("literal_line_ends")
    return _trim(_unescape(text))


def _unescape(text: str) -> str:
    return _LITERAL_LINE_END.sub("\n", text.replace("\\r\\n", "\\n")).replace('\\"', '"').replace("\\t", "\t")


def _dirt(text: str, sections: dict[str, str], criteria: dict[str, str]) -> str:
    if is_placeholder(text):
        return "placeholder"
    lines = text.split("\n")
    bracketed = [found[1] for line in lines if len(line) < LONGEST_LABEL and (found := _BRACKETED_LINE.match(line))]
    if (
        _YAML_BLOCK.match(text)
        or _without_label(text, sections) != text
        or _BARE_HEADING.match(text)
        or _CRITIQUE_LINE.search(text)
        or any(section_named(name, sections) for name in bracketed)
    ):
        return "form_in_text"
    if len(_FENCE.findall(text)) % 2:
        return "open_fence"
    if len(_criteria_of(lines, criteria)) > 1:
        return "critique_in_text"
    *before, last = text.split("\n\n") if "\n\n" in text else lines
    if before and _is_remark(last, criteria) and not _has_topic(last, before):
        return "remark_in_text"
    return ""


def _criteria_of(lines: list[str], criteria: dict[str, str]) -> set[str]:
    labels = (_CRITERION_LINE.match(line[:LONGEST_LABEL]) for line in lines)
    named = (criterion_named(label[1], criteria) for label in labels if label)
    return {found[0] for found in named if found and found[1]}


def _is_remark(paragraph: str, criteria: dict[str, str]) -> bool:
    """Whether a last paragraph begins with a remark about the answer that it is in, or is a note in brackets."""
    if len(paragraph) > LONGEST_REMARK or "```" in paragraph:
        return False
    if _ITSELF.search(paragraph[:60]) or _SURELY_REMARK.match(paragraph) or _BRACKETED_NOTE.fullmatch(paragraph):
        return True
    if _EXPLANATION.match(paragraph):
        return bool(_ITSELF.search(paragraph) or _CHANGED.search(paragraph))
    labelled = _REMARK.match(paragraph) or _criteria_of([paragraph.partition("\n")[0]], criteria)
    return bool(labelled) and _speaks_of_itself(paragraph)


def _has_topic(paragraph: str, before: list[str]) -> bool:
    """Whether "This response is called ..." is about a response that is the text's topic, without praise."""
    topic = _TOPIC.match(paragraph)
    if topic is None or _PRAISE.search(paragraph):
        return False
    return any(re.search(rf"\b{topic[1]}\b", part, re.IGNORECASE) for part in before)


def _speaks_of_itself(remark: str) -> bool:
    """Whether a remark is about the rewriting, not about the topic of the text."""
    if _ITSELF.search(remark) or _CHANGED.search(remark):
        return True
    return bool(_NAMES_IT.search(remark)) and not _ASKS.search(remark)
