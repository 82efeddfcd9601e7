"""The generation config with which a student is exported, and the tokens that end its answers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stop_tokens(configured: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the tokens that end an answer: first the one that is trained, then those of model and tokenizer.

    Args:
        configured: `eos_token_id` of a generation config: an id, a list, or None.
        tokenizer: the student's, with a chat template.
    """
    from operators.student.chat_format import chat_format

    listed: Iterable[Any] = configured if isinstance(configured, list | tuple) else [configured]
    stops = [chat_format(tokenizer).end_token, *listed, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in stops if token is not None))


def exportable(settings: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> "tuple[GenerationConfig, str]":
    """A generation config that can be saved and stops at the learnt end of turn, and what was changed for that.

    transformers refuses to save sampling values together with `do_sample: false`, which many published models have.

    Returns:
        The config, and "" or what was changed, such as "do_sample: true".
    """
    from copy import deepcopy

    from transformers import GenerationConfig

    def is_valid(candidate: GenerationConfig) -> bool:
        try:
            candidate.validate(strict=True)
        except ValueError:
            return False
        return True

    def is_token(value: object) -> bool:
        return isinstance(value, list) or (isinstance(value, int) and value >= 0)

    chosen, changed = deepcopy(settings), ""
    if not is_valid(chosen):
        chosen.do_sample, changed = True, "do_sample: true"
    if not is_valid(chosen):
        kept = {name: value for name in _TOKENS if is_token(value := getattr(settings, name, None))}
        chosen, changed = GenerationConfig(**kept), "nothing of it but its token ids"
    stops = stop_tokens(chosen.eos_token_id, tokenizer)
    chosen.eos_token_id = stops if len(stops) > 1 else stops[0]
    return chosen, changed
