"""Finds what a teacher says about its own rewriting: "Here is a better answer:" before a text, a note or a list of
changes behind it.

English has many forms, so its patterns look for an improved answer anywhere in the first or last paragraph. Of other
languages only the usual words are known.
"""

import re

from operators.reflect.reply_parts import criterion_named

LONGEST_REMARK = 800  # characters; a longer last paragraph is part of the text
LONGEST_EFFECT = 300  # characters of a paragraph that says what the changes do
LONGEST_LIST = 1600  # characters of a list of changes
LONGEST_OPENING = 300  # characters of a first paragraph that may be an announcement
LONGEST_LABEL = 120  # characters of a line in which a name is searched

_FRESH = (
    r"(?:better|improved|revised|rewritten|updated|enhanced|refined|corrected|reworked|polished|optimi[sz]ed|"
    r"reformulated|new)"
)
_NOUN = r"(?:answer|response|reply|instruction|prompt|rewrite|rewriting)"
_VERSION = rf"version(?: of (?:the|your|this|my) (?:original )?{_NOUN})?"
_MORE = rf"(?:{_FRESH}|more \w+(?:,? (?:and )?(?:more )?\w+){{0,2}})"
_ABOUT = rf"(?:\w+,? ){{0,5}}{_MORE},?(?: \w+,?){{0,4}}? (?:{_NOUN}\b[^\n:.]{{0,60}}|{_VERSION})"
_OPENER = (
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|understood|thank you|thanks)\b[ \t]*"
    r"(?:thing|for (?:the|your) (?:\w+ )?(?:feedback|critique))?[!,.:]*\s*)?"
)
_ON_CRITIQUE = (
    r"(?:(?:based on|given|considering|following|with|after|in light of|taking|to address|addressing|incorporating|"
    r"using|as per|per|in response to) (?:all )?(?:the|this|these|those|my|your)(?: above)? "
    r"(?:critiques?|criticisms?|feedback|evaluation|assessment|points|issues|comments|concerns|suggestions|criteria)\b"
    r"[^\n:,]{0,40},\s*)?"
)
_CHANGES_IT = (
    r"i(?:['’]ve| have|['’]ll| will)? (?:now )?(?:rewrite|rewrote|rewritten|revise|revised|improve|improved)\b"
)
_ENGLISH = (
    rf"{_OPENER}{_ON_CRITIQUE}(?:"
    rf"(?:here(?:['’]s| is| are| comes)|below is|(?:please )?(?:find|see) below|this is|the following is) {_ABOUT}"
    r"\W{0,3}(?::|\.?[ \t]*\n|[.!](?=\s))"
    rf"|here(?:['’]s| is) an? {_NOUN} that is (?:more|better|now|both)\b[^\n:.]{{0,80}}:"
    rf"|(?:let me (?:now )?(?:rewrite|revise|improve) (?:the|this|your|my) (?:original )?{_NOUN}\b|{_CHANGES_IT})"
    r"[^\n:]{0,80}:"
    rf"|(?:the|a|my|an) {_MORE} (?:{_NOUN}|{_VERSION}) "
    r"(?:is|would be|could be|might be)\b[^\n:.]{0,40}:"
    rf"|let me (?:now )?(?:provide|give|offer|write) (?:you )?(?:with )?{_ABOUT}\W{{0,3}}:"
    rf"|here(?:['’]s| is) the {_NOUN},? {_FRESH}\b[^\n:]{{0,60}}:"
    rf"|{_FRESH} {_VERSION}\W{{0,3}}:"
    r"|here(?:['’]s| is) (?:the|my|your|an?) (?:answer|response|reply)\W{0,3}:"
    r")"
)
_OTHER = (
    r"(?:以下(?:是|为)|这是|這是)?(?:我)?(?:更好|改进|改進|改善|优化|優化|修改|修订|重写)(?:后|後|过|版)?的?"
    r"(?:回答|答案|回复|回應|指令|版本)\s?[:：]",
    r"(?:以下(?:は|が)|これは)?(?:より良い|改善|改良|修正)(?:された|した|版の|後の)?(?:回答|応答|答え|指示)(?:です)?\s?[:：。]",
    r"(?:hier (?:ist|kommt) )?(?:eine |die |meine )?(?:bessere|verbesserte|überarbeitete|neue) "
    r"(?:antwort|anweisung|version|fassung)\s?:",
    r"(?:voici )?(?:une |la |ma )?(?:(?:meilleure|nouvelle) (?:réponse|instruction|version)|"
    r"(?:réponse|instruction|version) (?:améliorée|révisée|corrigée))\s?:",
    r"(?:(?:aquí|a continuación) (?:está|tienes|presento) )?(?:una |la |mi )?"
    r"(?:(?:mejor|nueva) (?:respuesta|instrucción|versión)|"
    r"(?:respuesta|instrucción|versión) (?:mejorada|revisada|corregida))\s?:",
    r"(?:aqui está )?(?:uma |a )?(?:(?:melhor|nova) (?:resposta|instrução)|"
    r"(?:resposta|instrução|versão) (?:melhorada|revisada))\s?:",
    r"(?:ecco )?(?:una |la )?(?:(?:migliore|nuova) (?:risposta|istruzione)|"
    r"(?:risposta|istruzione|versione) (?:migliorata|rivista))\s?:",
    r"(?:вот )?(?:улучшенный|лучший|исправленный|новый) (?:ответ|вариант(?: ответа)?)\s?:",
    r"(?:개선된|더 나은|수정된) (?:답변|응답|지시)\s?[:：]",
)
_OPENING = re.compile(rf"\A\W{{0,4}}(?:{_ENGLISH}|{'|'.join(_OTHER)})[\s*_]*", re.IGNORECASE)
_SAYS_IT_REWRITES = re.compile(
    rf"\bi(?:['’]ve| have)? (?:now )?(?:rewritten|rewrote|revised|improved|corrected|reworked|updated) "
    rf"(?:the|your|this|my) (?:original )?{_NOUN}\b",
    re.IGNORECASE,
)
# An instruction may ask for "a better answer to this question:", so only beginnings that ask for nothing count.
_ANNOUNCES = re.compile(
    r"\A\W*(?:here|below|this|the|an?|my|to|in|with|based|following|given|so|now|then|sure|okay|certainly|thank)\b"
    rf".*\b(?:an?|the|my|your) {_FRESH}(?:,? \w+){{0,3}} {_NOUN}\b.*:\W*\Z",
    re.IGNORECASE | re.DOTALL,
)

# "Revised: ..." alone; with "Original: ..." the text compares two versions.
_REVISED = re.compile(
    r"\A[\W_]*(?:revised|rewritten|improved|reworked)[*_]*[ \t]*[:：][\s*_]*(?!.*^\W*(?:original|before|old)\b)",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_ON_FEEDBACK = re.compile(
    r"\A\W*(?:(?:as )?per|following|based on|given|considering|after \w+|taking|in response to|in light of|"
    r"(?:to )?address(?:ing)?|incorporating|reflecting|with) (?:all )?(?:the|this|your|my)(?: above)? "
    r"(?:(?:critique|criticism)s?(?: (?:above|given|provided|points|into account))?|"
    r"feedback(?: above)?(?=:|,? here\b|, i\b)|"
    r"(?<=per the )feedback|(?<=incorporating the )feedback)\s?[,:]",
    re.IGNORECASE,
)
# A model that thinks without marks around its thoughts.
_ALOUD = re.compile(
    r"\A\W*(?:okay|ok|alright|all right|hmm+|so|well|let['’]?s see|let me (?:see|think))\b[,.! ]+"
    r"(?:(?:so|now|first|well|let me (?:see|think)|let['’]s see)\b[,.! ]+){0,3}"
    r"(?:the user\b|(?:i|we) (?:need|have|should|must|want|am supposed|are supposed)\b[^\n.]{0,80}"
    rf"\b(?:rewrite|improve|revise|{_FRESH} {_NOUN}|critique|criteria)\b)",
    re.IGNORECASE,
)
# Another question after the answer, as base models write it; an example of a conversation is announced by a colon.
_NEXT_TURN = re.compile(r"(?<=[^\s:：])[*_]*\n\n[*_#]*\s?(?:human|user)[*_]*\s?[:：]", re.IGNORECASE)
_ANY_TURN = re.compile(
    r"^[\W_]*(?:human|user|assistant|ai|bot|chatbot)\b[^\n:：]{0,20}[:：]", re.IGNORECASE | re.MULTILINE
)

# A paragraph that calls the text an improved answer.
_ITSELF = re.compile(
    rf"\b(?:the|this|my|your|above) (?:{_FRESH}|original|previous) (?:{_NOUN})\b|"
    r"\b(?:the|this|your|above) (?:critique|criticism)s?\b(?! (?:of|should|must|has)\b)|"
    rf"\b(?:by|with) (?:making )?these (?:changes|improvements), the {_NOUN}\b|"
    rf"\blet me know if\b.{{0,60}}\bthis {_NOUN}\b|"
    rf"\b(?:the|this) {_NOUN} now (?:\w+s|avoids?|has|is)\b|\A\W*this is an? (?!new\b){_MORE} {_NOUN}\b|"
    rf"\bcompared (?:to|with) the (?:original|previous|first)(?: one| version| {_NOUN})?,? "
    rf"(?:this|the) (?:one|version|{_NOUN})\b|"
    rf"\bthis (?:{_NOUN}|version|revision) (?:is|now|has|was|provides?|gives?|addresses|improves?|includes?|adds?|"
    r"corrects?|removes?|offers?|maintains?|keeps?|makes?|clarifies|avoids?|should)\b",
    re.IGNORECASE,
)
_OFFER = re.compile(
    rf"\blet me know (?:if|whether)\b.{{0,80}}\b(?:this {_NOUN}|(?:improvements?|revisions?|refinements?|adjustments?) "
    rf"(?:to|of|in) (?:the|this) {_NOUN})\b",
    re.IGNORECASE,
)
# What changes do to the answer, in a short paragraph.
_EFFECT = re.compile(
    rf"\b(?:makes?|making|made) (?:the|this|your) {_NOUN} (?:more|much|less|\w+er)\b|"
    rf"\bthe {_NOUN} (?:becomes|gets) (?:more|much|less|\w+er)\b|"
    rf"\bi(?:['’]ve| have)? (?:now )?(?:rewritten|rewrote|revised|improved|changed|corrected) "
    rf"(?:the|this|my|your) (?:original )?{_NOUN}\b",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    r"\bi(?:['’]ve| have)? (?:have )?(?:also )?(?:rewritten|rewrote|revised|improved|changed|corrected|"
    r"removed|added|kept|expanded|clarified|shortened|simplified|fixed|made|included|tried)\b",
    re.IGNORECASE,
)
_BEGINS_WITH_CHANGE = re.compile(
    rf"[\W_]*(?:p\.? ?s\.?:?\s*|note that |in (?:this|the) {_FRESH} (?:{_NOUN}|version),? )?{_CHANGED.pattern}",
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
_CHANGES = r"(?:changes|improvements|revisions|edits|modifications)"
_LIST_OF_CHANGES = re.compile(
    rf"\A\W*(?:(?:an? )?(?:explanation|summary|list|overview) of (?:the |my )?(?:key |main )?{_CHANGES}(?: made)?|"
    rf"(?:the |key |main |notable |my |specific ){{0,2}}{_CHANGES} "
    rf"(?:(?:i )?(?:have |were )?made|in (?:this|the) {_FRESH} \w+)"
    r"(?: (?:to|in) the (?:original )?\w+)?|(?:key|main|notable) (?:improvements|revisions|edits)|"
    rf"why (?:this|the|it)(?: \w+){{0,3}} (?:is|are) (?:better|improved)|why it['’]s better|"
    r"what (?:(?:i|has|was|i['’]ve|i have) )?changed|"
    r"改进(?:之处|点|说明)|改進(?:之處|點|說明)|修改说明|修改說明|主要(?:改进|修改)|変更点|改善点|"
    r"vorgenommene änderungen|modifications apportées|cambios realizados)"
    r"\W{0,4}(?:[:：]|\n|\Z)",
    re.IGNORECASE,
)
_BRACKETED_NOTE = re.compile(
    r"\s*[*_]*[(\[（【][*_]*(?:please )?"
    r"(?:note|注|备注|備註|说明|說明|注記|hinweis|anmerkung|remarque|nota|примечание)\s*[*_]*[:：].*[)\]）】]\W*",
    re.IGNORECASE | re.DOTALL,
)
_SCORE = re.compile(
    r"[\W_]*(?:(?:overall|final|total|my|self) )?score[\W_]*[:：]?[\W_]*\d{1,3}(?:\.\d+)?\s*"
    r"(?:(?:/|out of)\s*\d{1,3})?[\W_]*",
    re.IGNORECASE,
)
_DID = re.compile(
    rf"\A[\W_]*(?:(?:key|main|my) )?(?:{_CHANGES}|corrections)(?: made)?[\W_]*[:：][\W_]*(?:i )?(?:have )?(?:also )?"
    r"(?:added|removed|fixed|corrected|clarified|expanded|improved|changed|rewrote|rewritten|included|simplified|"
    r"shortened|provided|made|enhanced|more (?:detail|clear|concise|specific|precise)|"
    r"better (?:structure|flow|clarity))",
    re.IGNORECASE,
)
_RATING = re.compile(r"\b\d{1,3}(?:\.\d)?\s*/\s*(?:5|10|100)\b")
_CRITERION_LINE = re.compile(r"[\s>*_•+–#-]*(?:\d{1,2}[.)]\s*)?[*_]*([^\W\d_][\w /&-]{1,60}?)[*_]*[:：]")


def without_opening(text: str) -> str:
    """`text` without "Here is a better answer:" before it."""
    found = _OPENING.match(text) or _REVISED.match(text)
    return text[found.end() :] if found else text


def thinks_aloud(text: str) -> bool:
    """Whether `text` begins with the teacher's thoughts about its task, without marks around them."""
    return bool(_ALOUD.match(text))


def goes_on(text: str) -> bool:
    """Whether `text` goes on with the next turn of a user, after a text that is no conversation."""
    found = _NEXT_TURN.search(text)
    return found is not None and not _ANY_TURN.search(text[: found.start()])


def opens_with_remark(text: str) -> bool:
    """Whether the first of several paragraphs speaks of an improved answer, in no form that is surely removed."""
    if _ON_FEEDBACK.match(text):
        return True
    first, _, others = text.partition("\n\n")
    if not others.strip() or len(first) > LONGEST_OPENING:
        return False
    return bool(_SAYS_IT_REWRITES.search(first) or _ANNOUNCES.match(first))


def without_note(text: str) -> str:
    """`text` without a note about the rewriting in its last paragraph."""
    note = _NOTE.search(text, text.rstrip().rfind("\n\n") if "\n\n" in text else max(0, text.rfind("\n")))
    if note and (_ITSELF.search(note["note"]) or _CHANGED.search(note["note"])):
        return text[: note.start()]
    return text


def ends_with_remark(text: str, criteria: dict[str, str]) -> bool:
    """Whether `text` ends with a remark about the rewriting, or with a list of changes under its heading."""
    parts = text.split("\n\n") if "\n\n" in text else text.split("\n")
    *before, last = parts
    if not before:
        return False
    rest = len(parts[0])
    for part in parts[1:]:
        if len(text) - rest <= LONGEST_LIST and _LIST_OF_CHANGES.match(part):
            return True
        rest += len(part)
    return _is_remark(last, criteria) and not _has_topic(last, before)


def criteria_of(lines: list[str], criteria: dict[str, str]) -> set[str]:
    """The criteria by whose names lines begin."""
    labels = (_CRITERION_LINE.match(line[:LONGEST_LABEL]) for line in lines)
    named = (criterion_named(label[1], criteria) for label in labels if label)
    return {found[0] for found in named if found and found[1]}


def _is_remark(paragraph: str, criteria: dict[str, str]) -> bool:
    """Whether a last paragraph begins with a remark about the answer that it is in, or is a note in brackets."""
    if len(paragraph) > LONGEST_REMARK or "```" in paragraph:
        return False
    if _ITSELF.search(paragraph[:60]) or _OFFER.search(paragraph) or _BRACKETED_NOTE.fullmatch(paragraph):
        return True
    if _SCORE.fullmatch(paragraph) or _DID.match(paragraph):
        return True
    if len(paragraph) <= LONGEST_EFFECT and _EFFECT.search(paragraph):
        return True
    if _BEGINS_WITH_CHANGE.match(paragraph) and _NAMES_IT.search(paragraph):
        return True
    if _EXPLANATION.match(paragraph):
        return bool(_ITSELF.search(paragraph) or _CHANGED.search(paragraph))
    if _RATING.search(paragraph) and any(name.replace("_", " ") in paragraph.casefold() for name in criteria):
        return True
    labelled = _REMARK.match(paragraph) or criteria_of([paragraph.partition("\n")[0]], criteria)
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
