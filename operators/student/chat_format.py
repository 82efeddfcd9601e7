"""What a student's chat template does with an assistant's turn, found out once by rendering a harmless dialogue.

Nothing here knows a model family. The prompt ends where the template's generation prompt ends, or where its
`{% generation %}` marks begin; the turn ends with the first control token after the answer.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from operators.chat_markup import control_tokens

if TYPE_CHECKING:  # seconds to import, and most processes that encode nothing import this module
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]  # {"role": ..., "content": ...}, as chat templates read it
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKED, _ANSWER = "Name a colour.", "Blue."


class EncodingError(ValueError):
    """This one example cannot be encoded; `reason` is the word that goes into its outcome."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer and its template write an assistant's turn.

    Attributes:
        template: the Jinja text; "default" where the tokenizer has several.
        marked: the template says with `{% generation %}` marks what is learnt.
        control: ids of the control tokens, which no text may hold.
        end_token: id of the control token that ends an assistant's turn; learnt, and where answers stop.
        skipped: what the template writes between prompt and answer, such as an empty think block; never learnt.
        by_pieces: prompt and answer may be tokenized one by one, as inference does; else the whole text at once.
    """

    template: str
    marked: bool
    control: frozenset[int]
    end_token: int
    skipped: str
    by_pieces: bool


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template that is used for plain dialogues.

    Raises:
        ValueError: the tokenizer has no template, or several without one named "default".
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" in template:
        return str(template["default"])
    if not isinstance(template, str):
        found = f"only templates named {', '.join(template)}" if template else "no chat template"
        raise ValueError(
            f"encode: {name_of(tokenizer)} has {found}, so nothing says how its turns are written; "
            'use an instruction-tuned model, or add a chat_template.jinja (or a template named "default") to its folder'
        )
    return template


def chat_format(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """What the template does, remembered for each tokenizer and template.

    Raises:
        ValueError: there is no template.
        EncodingError: a ValueError; the template fails, loses the answer, or ends its turn with no control token.
    """
    return _probe(tokenizer, template_of(tokenizer))


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """How error messages call the model."""
    return f"student {tokenizer.name_or_path}"


def render(tokenizer: "PreTrainedTokenizerBase", turns: list[Turn], *, prompt: bool = False) -> str:
    """The template's text of a dialogue; with `prompt` up to where the assistant's next turn begins.

    Raises:
        EncodingError: `chat_template`: the template refuses these turns.
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template_of(tokenizer), tokenize=False, add_generation_prompt=prompt
            )
        )
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise EncodingError(
            "chat_template",
            f"encode: the chat template of {name_of(tokenizer)} refuses turns of {roles}: {error}; "
            "use a student whose template takes them",
        ) from None


def marked_spans(tokenizer: "PreTrainedTokenizerBase", turns: list[Turn]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered dialogue, and begin and end in it of each `{% generation %}` block, in characters."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [turns],
            chat_template=template_of(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise EncodingError(
            "chat_template", f"encode: the chat template of {name_of(tokenizer)} refuses a dialogue: {error}"
        ) from None
    return str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]]


def tokens_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of rendered text; the template has written all control tokens itself."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def bare_control_tokens(tokenizer: "PreTrainedTokenizerBase", turns: list[Turn]) -> int:
    """How many control tokens the template itself writes for turns of these roles."""
    bare = [{**turn, "content": "x"} if turn.get("content") else turn for turn in turns]
    return _count_bare(tokenizer, template_of(tokenizer), json.dumps(bare))


@lru_cache(maxsize=1024)  # most data has few kinds of dialogue, and rendering costs as much as an example
def _count_bare(tokenizer: "PreTrainedTokenizerBase", _template: str, bare: str) -> int:
    control = control_tokens(tokenizer)
    return sum(token in control for token in tokens_of(tokenizer, render(tokenizer, json.loads(bare))))


@lru_cache(maxsize=8)
def _probe(tokenizer: "PreTrainedTokenizerBase", template: str) -> ChatFormat:
    turns: list[Turn] = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}]
    marked = bool(_GENERATION_MARK.search(template))
    if marked:
        text, spans = marked_spans(tokenizer, turns)
        begin, end = spans[0] if spans else (0, 0)
    else:
        text, prompt = render(tokenizer, turns), render(tokenizer, turns[:1], prompt=True)
        require_prefix(tokenizer, text, prompt)
        begin, end = len(prompt), len(text)
    answer = text.find(_ANSWER, begin, end)
    if answer < 0:
        raise EncodingError(
            "no_loss",
            f"encode: the chat template of {name_of(tokenizer)} writes no response ({text[begin:end]!r} where "
            f"{_ANSWER!r} belongs); use a template that writes the content of each turn as it is",
        )
    skipped = text[begin:answer] if text[begin:answer].strip() else ""
    start, control = begin + len(skipped), frozenset(control_tokens(tokenizer))
    ends = [token for token in tokens_of(tokenizer, text[answer + len(_ANSWER) : end]) if token in control]
    if not ends:
        raise EncodingError(
            "no_end_of_turn",
            f"encode: the chat template of {name_of(tokenizer)} ends an assistant's turn with "
            f"{text[answer + len(_ANSWER) : end]!r}, which holds no control token, so the student would not learn to "
            "stop; use a template that writes the end-of-turn token after the response (inside its generation marks)",
        )
    # Tokenizers that put a blank before whatever they are given would write one before each answer.
    pieces = tokens_of(tokenizer, text[:start]) + tokens_of(tokenizer, text[start:])
    by_pieces = tokenizer.decode(pieces) == tokenizer.decode(tokens_of(tokenizer, text))
    return ChatFormat(template, marked, control, ends[0], skipped, by_pieces)


def require_prefix(tokenizer: "PreTrainedTokenizerBase", text: str, prompt: str) -> None:
    """Refuse a prompt that the whole dialogue does not begin with.

    Raises:
        EncodingError: `chat_template`.
    """
    if not text.startswith(prompt):
        raise EncodingError(
            "chat_template",
            f"encode: with the chat template of {name_of(tokenizer)} the prompt ({prompt[-40:]!r} at its end) is no "
            "prefix of the whole dialogue; use a template with {% generation %} marks",
        )
