"""How a pair of instruction and response becomes tokens and labels: by the student's own chat template.

The mask comes from the template's `{% generation %}` marks where it has them, else from rendering the prompt
alone, which must be a token prefix of the whole; nothing here knows any model family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from operators.chat_markup import control_tokens

if TYPE_CHECKING:  # seconds to import, and most processes that encode nothing import this module
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # a label without loss
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class EncodingError(ValueError):
    """This one example cannot be encoded; `reason` is the word that goes into its outcome."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """One example: `labels` equals `input_ids` on the response and its end-of-turn token, and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def user_text(instruction: str, input: str | None) -> str:
    """The one user turn of an example: the instruction and, if there is an input, a blank line and the input."""
    return f"{instruction}\n\n{input}" if input else instruction


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Raises:
        ValueError: the model has no chat template, so nothing says how its turns are written.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"encode: student {model} has no single chat template; use an instruction-tuned model")
    return tokenizer


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    input: str | None,
    response: str,
) -> Encoded:
    """Encode one user turn and its response for supervised fine-tuning.

    Args:
        tokenizer: the student's, with a chat template.
        instruction: what is asked.
        input: what it is asked about; may be empty or null.
        response: what is learnt.

    Returns:
        Tokens of the whole conversation as the template writes it; loss on the response and its end of turn only.

    Raises:
        EncodingError: a ValueError; `special_tokens` if a text holds a control token, `chat_template` if the prompt
            is no token prefix of the whole, `no_loss` if no token is left to learn from.
    """
    user = {"role": "user", "content": user_text(instruction, input)}
    turns = [user, {"role": "assistant", "content": response}]
    if _GENERATION_MARK.search(tokenizer.chat_template):
        input_ids, learnt = _render_with_marks(tokenizer, turns)
    else:
        input_ids, learnt = _render_by_prefix(tokenizer, turns)
    _refuse_control_tokens(tokenizer, input_ids)
    if not any(learnt):
        raise EncodingError("no_loss", f"encode: the template of {_name(tokenizer)} leaves no token of the response")
    labels = [token if learn else IGNORED for token, learn in zip(input_ids, learnt, strict=True)]
    return Encoded(input_ids, labels)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode a harmless example, so that a template which fits no example is refused before the data is read.

    Raises:
        ValueError: naming the student whose template does not fit.
    """
    encode_example(tokenizer, "Name a colour.", "", "Blue.")


def _render_with_marks(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]
) -> tuple[list[int], Sequence[bool]]:
    rendered = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    return list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]


def _render_by_prefix(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]
) -> tuple[list[int], Sequence[bool]]:
    whole = _render(tokenizer, turns)
    prompt = _render(tokenizer, turns[:1], add_generation_prompt=True)
    if whole[: len(prompt)] != prompt:
        raise EncodingError(
            "chat_template",
            f"encode: with the chat template of {_name(tokenizer)} the prompt's {len(prompt)} tokens are no prefix of "
            f"the example's {len(whole)}; use a template with {{% generation %}} marks",
        )
    # Some templates write a line break after the end-of-turn token; no model ever generates it.
    special = control_tokens(tokenizer)
    ends = [place for place in range(len(prompt), len(whole)) if whole[place] in special]
    end = ends[-1] + 1 if ends else len(whole)
    return whole, [len(prompt) <= place < end for place in range(len(whole))]


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> list[int]:
    # transformers 5 returns a dict by default, which would be mistaken for a sequence of its keys.
    return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options))


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> None:
    """The template writes a fixed number of control tokens; any more came out of the texts."""
    special = control_tokens(tokenizer)
    bare = _render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
    found, written = (sum(token in special for token in ids) for ids in (input_ids, bare))
    if found != written:
        raise EncodingError(
            "special_tokens",
            f"encode: {found} control tokens of {_name(tokenizer)} in one example against {written} of its template; "
            "the texts hold chat markup",
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"student {tokenizer.name_or_path}"
