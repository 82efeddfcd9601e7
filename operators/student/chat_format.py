"""Finds out how a student's chat template writes an assistant's turn, by rendering a short dialogue once.

This code has no list of model families. The prompt ends where the template's generation prompt ends, or where its
`{% generation %}` marks begin; the turn ends with the first control token after the answer.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from operators.chat_markup import control_tokens

if TYPE_CHECKING:  # takes seconds to import, and most processes that import this module encode nothing
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]  # {"role": ..., "content": ...}, as chat templates read it
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKED, _ANSWER = "Name a colour.", "Blue."


class EncodingError(ValueError):
    """This example cannot be encoded; `reason` is the word for its outcome."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer and its template write an assistant's turn.

    Attributes:
        template: the Jinja text; the one named "default" if the tokenizer has several.
        marked: `{% generation %}` marks in the template tell which text is learnt.
        control: ids of the control tokens, which no text may contain.
        end_token: id of the control token that ends an assistant's turn; it is learnt, and answers stop there.
        skipped: text that the template writes between prompt and answer, such as an empty think block; never learnt.
        by_pieces: prompt and answer may be tokenized separately, as in inference; else the whole text at once.
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
            "use an instruction-tuned model, or name a Jinja file in student.chat_template"
        )
    return template


def chat_format(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """The chat format of a tokenizer, cached for each tokenizer and template.

    Raises:
        ValueError: there is no template.
        EncodingError: a ValueError; the template fails, loses the answer, or ends its turn without a control token.
    """
    return _probe(tokenizer, template_of(tokenizer))


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The name of the model in error messages."""
    return f"student {tokenizer.name_or_path}"


def render(tokenizer: "PreTrainedTokenizerBase", turns: list[Turn], *, prompt: bool = False) -> str:
    """The dialogue as the template writes it; with `prompt`, up to where the assistant's next turn begins.

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
    """The rendered dialogue, and the begin and end of each `{% generation %}` block in it, in characters."""
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
    """The number of control tokens that the template itself writes for turns of these roles."""
    bare = [{**turn, "content": "x"} if turn.get("content") else turn for turn in turns]
    return _count_bare(tokenizer, template_of(tokenizer), json.dumps(bare))


@lru_cache(maxsize=1024)  # most data has few sequences of roles, and rendering costs as much as encoding an example
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
    # A tokenizer that puts a blank before every text would put one before each answer if that is tokenized separately.
    pieces = tokens_of(tokenizer, text[:start]) + tokens_of(tokenizer, text[start:])
    by_pieces = tokenizer.decode(pieces) == tokenizer.decode(tokens_of(tokenizer, text))
    return ChatFormat(template, marked, control, ends[0], skipped, by_pieces)


def require_prefix(tokenizer: "PreTrainedTokenizerBase", text: str, prompt: str) -> None:
    """Refuse a prompt that is not the beginning of the whole dialogue.

    Raises:
        EncodingError: `chat_template`.
    """
    if not text.startswith(prompt):
        raise EncodingError(
            "chat_template",
            f"encode: with the chat template of {name_of(tokenizer)} the prompt ({prompt[-40:]!r} at its end) is "
            "not a prefix of the whole dialogue; use a template with {% generation %} marks",
        )
