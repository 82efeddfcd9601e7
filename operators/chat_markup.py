"""Breaks chat markup inside data, so that no tokenizer takes a piece of text for one of its control tokens.

A plain space goes between the marker's brackets and its name: `<|im_end|>` becomes `<| im_end |>`. A reader still sees
what the text said, a tokenizer sees ordinary characters. Text without a marker stays byte-identical.
"""

import functools
import re
from typing import Any

# Full-width brackets and bars (DeepSeek's own bar is U+FF5C) count as their ASCII twins: some tokenizers fold them.
_OPEN, _CLOSE, _BAR = "[<＜]", "[>＞]", "[|｜]"
_NAME = r"(?=[^|｜<>＜＞\n]*[^\W_])[^\s|｜<>＜＞](?:[^|｜<>＜＞\n]{0,62}[^\s|｜<>＜＞])?"

# Tags of chat templates that are not HTML elements, of the model families that do not write them as <|name|>.
_TAGS = (
    "start_of_turn|end_of_turn|start_of_image|end_of_image|bos|eos|"  # Gemma
    "think|tool_call|tool_calls|tool_response|tool_responses|"  # Qwen, Hermes, SmolLM3
    r"extra_id_\d+|reserved_\d+|reserved_token_\d+|unused\d+|"  # Nemotron, Baichuan, Gemma
    "begin_of_text|end_of_text|end_of_utterance|fake_token_around_image"
)
_BRACKETED = (
    "INST|SYS|SYSTEM_PROMPT|MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|"  # Mistral
    "ARGS|CALL_ID|THINK|PREFIX|SUFFIX|MIDDLE|IMG|IMG_BREAK|IMG_END|"  # Mistral
    "gMASK|sMASK"  # GLM
)
_GENERIC = (
    rf"{_OPEN}{_BAR}{_NAME}{_BAR}{_CLOSE}",  # <|im_start|>: Qwen, Llama 3, Phi, GLM, Command, DeepSeek, gpt-oss
    rf"{_OPEN}{_BAR}[^\W_][\w/]{{0,63}}{_CLOSE}",  # <|turn>: Gemma 4 opens
    rf"{_OPEN}[^\W_][\w/]{{0,63}}{_BAR}{_CLOSE}",  # <turn|>: Gemma 4 closes
    rf"{_OPEN}/?(?:{_TAGS}){_CLOSE}",
    rf"[\[［]/?(?:{_BRACKETED})[\]］]",
    rf"{_OPEN}{{2}}/?SYS{_CLOSE}{{2}}",  # <<SYS>>: Llama 2
)
_GENERIC_PATTERN = re.compile("|".join(_GENERIC))
_MARKER_PARTS = re.compile(r"([\W_]+)(.*[^\W_])([\W_]+)", re.DOTALL)


def escape(text: str, special_tokens: frozenset[str]) -> str:
    """Put a space inside every chat marker of `text`; idempotent.

    Args:
        text: any text; ordinary text and ordinary HTML come back byte-identical.
        special_tokens: exact strings that the run's models encode as control tokens (`special_tokens_of`), and any
            other bracketed marker that must not survive, such as a prompt's own section delimiters. They are broken
            in addition to the generic syntax of the common model families. `<s>` counts as HTML unless it is in here.

    Raises:
        ValueError: a special token has no brackets around a name, so there is no place for the space.
    """
    opening, marker = _patterns(special_tokens)
    if not opening.search(text):
        return text
    while True:  # breaking one marker can leave another that overlapped it; each pass adds spaces, so this ends
        broken = marker.sub(_break, text)
        if broken == text:
            return text
        text = broken


def special_tokens_of(model: str) -> frozenset[str]:
    """The texts of the control tokens of `model`, a folder or hub id; see `control_tokens`."""
    from transformers import AutoTokenizer

    return frozenset(control_tokens(AutoTokenizer.from_pretrained(model, trust_remote_code=False)).values())


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id and text of each control token of a Hugging Face tokenizer: a special token that is a marker.

    A special token that is a plain word or bare punctuation (some models pad with `!`) does not count as a control
    token: it occurs in ordinary text with its ordinary meaning.
    """
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: text for number, text in special.items() if is_marker(text)}


def is_marker(token: str) -> bool:
    """Whether `token` is a name between punctuation, as `</s>` and `[INST]` are and `the`, `!` and ` ` are not."""
    return _MARKER_PARTS.fullmatch(token) is not None and not token[0].isspace() and not token[-1].isspace()


def _break(match: re.Match[str]) -> str:
    parts = _MARKER_PARTS.fullmatch(match.group())
    assert parts is not None, f"{match.group()!r} matched but has no brackets"  # noqa: S101 - cannot happen
    return f"{parts[1]} {parts[2]} {parts[3]}"


@functools.lru_cache(maxsize=8)
def _patterns(special_tokens: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A cheap test for the first character of any marker, and the markers themselves, longest first."""
    for token in special_tokens:
        if not is_marker(token):
            raise ValueError(
                f"escape: special token {token!r} is not a name in brackets; leave it out of special_tokens"
            )
    exact = sorted(
        (token for token in special_tokens if not _GENERIC_PATTERN.fullmatch(token)),
        key=lambda token: (-len(token), token),
    )
    first = "".join(re.escape(character) for character in sorted({token[0] for token in exact} | set("<＜[［")))
    marker = "|".join([*(re.escape(token) for token in exact), *_GENERIC])
    return re.compile(f"[{first}]"), re.compile(marker)
