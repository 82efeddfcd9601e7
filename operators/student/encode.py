"""Turns a dialogue into tokens and labels, with the student's own chat template and loss on the answers."""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from operators.student.chat_format import (
    ChatFormat,
    EncodingError,
    Turn,
    bare_control_tokens,
    chat_format,
    marked_spans,
    name_of,
    render,
    require_prefix,
    template_of,
    tokens_of,
)

if TYPE_CHECKING:  # takes seconds to import, and most processes that import this module encode nothing
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "EncodingError", "LossOn", "dialogue", "encode_dialogue", "encode_example"]

IGNORED = -100  # a label without loss
LossOn = Literal["last", "recycled", "all"]  # which of the assistant's turns are learnt


@dataclass(frozen=True)
class Encoded:
    """One example; `labels` are `input_ids` on learnt tokens (answers, each with its end-of-turn token), else -100."""

    input_ids: list[int]
    labels: list[int]


def user_text(instruction: str, input: str | None) -> str:
    """The text of the user's turn: the instruction and, if there is an input, a blank line and the input."""
    return f"{instruction}\n\n{input}" if input else instruction


def dialogue(
    instruction: str, input: str | None, response: str, turns_before: str | None = "", turns_after: str | None = ""
) -> list[Turn]:
    """All turns of a row, in order.

    Args:
        instruction: of the user.
        input: of the instruction; may be empty or null.
        response: the answer.
        turns_before: JSON list of {"role", "content"}, the system prompt and earlier turns; empty or null if none.
        turns_after: JSON list of the turns that follow; empty or null if none.
    """
    pair = [{"role": "user", "content": user_text(instruction, input)}, {"role": "assistant", "content": response}]
    return [*_turns(turns_before), *pair, *_turns(turns_after)]


def load_tokenizer(model: str, chat_template: str = "") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or hub id, with a chat template that replaces its own if one is given.

    Raises:
        ValueError: the model has no chat template, so nothing says how its turns are written.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if chat_template:
        tokenizer.chat_template = chat_template
    template_of(tokenizer)
    return tokenizer


def encode_example(
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    input: str | None,
    response: str,
    turns_before: str | None = "",
    turns_after: str | None = "",
    *,
    loss_on: LossOn = "last",
) -> Encoded:
    """Encode one row for supervised fine-tuning; arguments as of `dialogue`, result as of `encode_dialogue`."""
    turns = dialogue(instruction, input, response, turns_before, turns_after)
    return encode_dialogue(tokenizer, turns, loss_on, recycled=len(turns) - len(_turns(turns_after)) - 1)


def encode_dialogue(
    tokenizer: "PreTrainedTokenizerBase", turns: list[Turn], loss_on: LossOn = "last", recycled: int | None = None
) -> Encoded:
    """Encode a dialogue as the template writes it.

    Args:
        tokenizer: the student's, with a chat template.
        turns: at least one of them the assistant's.
        loss_on: learn the recycled answer and the last one, the recycled one alone, or all of the assistant's turns.
        recycled: the place in `turns` of the answer that was reflected on; the last answer if not given.

    Returns:
        Tokens of the whole dialogue; labels on the learnt answers and the end-of-turn token of each.

    Raises:
        EncodingError: a ValueError; `special_tokens` if a text contains a control token, `chat_template` if the
            template refuses the turns, `no_loss` if there is no answer to learn, `no_end_of_turn` if no token ends it.
    """
    form = chat_format(tokenizer)
    answers = [place for place, turn in enumerate(turns) if turn.get("role") == "assistant" and turn.get("content")]
    pair = [place for place in answers if place == recycled] if recycled is not None else answers[-1:]
    chosen = {"all": answers, "recycled": pair, "last": sorted({*pair, *answers[-1:]})}
    wanted = chosen[loss_on]
    if not wanted:
        raise EncodingError("no_loss", "encode: no turn of the assistant has a text, so there is nothing to learn")
    text, starts = _starts(tokenizer, form, turns, wanted)
    pieces = _pieces(tokenizer, form, text, starts)
    input_ids = [token for piece in pieces for token in piece]
    found, written = sum(token in form.control for token in input_ids), bare_control_tokens(tokenizer, turns)
    if found != written:
        raise EncodingError(
            "special_tokens",
            f"encode: {found} control tokens of {name_of(tokenizer)} in one example against {written} of its template; "
            "the texts hold chat markup",
        )
    labels = [IGNORED] * len(pieces[0])
    for piece in pieces[1:]:
        if form.end_token not in piece:
            raise EncodingError("no_end_of_turn", f"encode: a turn of {name_of(tokenizer)} has no end-of-turn token")
        end = piece.index(form.end_token) + 1
        labels += [*piece[:end], *[IGNORED] * (len(piece) - end)]
    return Encoded(input_ids, labels)


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Encode a short example, so that a template that fails on every example is refused before the data is read.

    Raises:
        ValueError: it names the student whose template fails, loses the response, or ends the assistant's turn without
            a control token.
    """
    encoded = encode_example(tokenizer, "Name a colour.", "", "Blue.")
    learnt = tokenizer.decode([token for token in encoded.labels[:-1] if token != IGNORED], skip_special_tokens=True)
    if learnt.strip() != "Blue.":
        raise EncodingError(
            "chat_template",
            f"encode: with the chat template of {name_of(tokenizer)} the labels of the answer 'Blue.' say {learnt!r}; "
            "use a template that writes the content of each turn as it is",
        )


def _turns(text: str | None) -> list[Turn]:
    turns: list[Turn] = json.loads(text) if text else []
    return turns


def _starts(
    tokenizer: "PreTrainedTokenizerBase", form: ChatFormat, turns: list[Turn], wanted: list[int]
) -> tuple[str, list[int]]:
    """The rendered dialogue, and for each wanted turn the character at which its answer begins."""
    if form.marked:
        text, spans = marked_spans(tokenizer, turns)
        assistants = [place for place, turn in enumerate(turns) if turn.get("role") == "assistant"]
        if len(spans) != len(assistants):
            raise EncodingError(
                "chat_template", f"encode: the template marks {len(spans)} of {len(assistants)} turns of the assistant"
            )
        begins = [spans[assistants.index(place)][0] for place in wanted]
    else:
        text = render(tokenizer, turns)
        prompts = [render(tokenizer, turns[:place], prompt=True) for place in wanted]
        for prompt in prompts:
            require_prefix(tokenizer, text, prompt)
        begins = [len(prompt) for prompt in prompts]
    # Some templates write an empty think block, but only before the last answer.
    starts = [begin + len(form.skipped) if text.startswith(form.skipped, begin) else begin for begin in begins]
    for start, place in zip(starts, wanted, strict=True):
        content = str(turns[place]["content"]).strip()
        if not content or not text[start:].lstrip().startswith(content):
            raise EncodingError(
                "no_loss", f"encode: the template of {name_of(tokenizer)} leaves no token of a response"
            )
    return text, starts


def _pieces(tokenizer: "PreTrainedTokenizerBase", form: ChatFormat, text: str, starts: list[int]) -> list[list[int]]:
    """Token ids of the text, cut before each answer, so that the text before an answer has the tokens of inference."""
    if form.by_pieces:
        cuts = [0, *starts, len(text)]
        parts = [text[begin:end] for begin, end in pairwise(cuts)]
        return list(tokenizer(parts, add_special_tokens=False, return_attention_mask=False).input_ids)
    whole, cuts = tokens_of(tokenizer, text), [0]
    for start in starts:
        prefix = tokens_of(tokenizer, text[:start])
        if whole[: len(prefix)] != prefix:
            raise EncodingError(
                "chat_template",
                f"encode: the {len(prefix)} tokens of a prompt are not a prefix of the {len(whole)} of its dialogue "
                f"with the tokenizer of {name_of(tokenizer)}",
            )
        cuts.append(len(prefix))
    return [whole[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(whole)], strict=True)]
