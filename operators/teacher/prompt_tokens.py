"""A call's messages as the teacher's tokens, and an upper bound of their number if the tokenizer is not known."""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from operators.teacher.config import TeacherConfig

TEMPLATE_TOKENS = 64  # upper bound for an unknown chat template around a call's texts


@lru_cache(maxsize=8)
def chat_tokenizer(model: str) -> Any:
    """The model's tokenizer, with its chat template; loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def prompt_token_ids(messages: str, teacher: "TeacherConfig") -> list[int]:
    """Render a call's messages with the model's chat template, up to where the reply begins."""
    ids: list[int] = chat_tokenizer(teacher.model).apply_chat_template(
        json.loads(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **teacher.chat_template_kwargs,
    )
    return ids


def num_prompt_tokens(messages: str, teacher: "TeacherConfig") -> int:
    """Length of a prompt in tokens: exact for vllm, from `teacher.tokenizer` if it is set, else the number of bytes.

    No byte-level tokenizer makes more tokens than a text has bytes, so a budget that reserves bytes is not exceeded.
    The true number is known when the call is settled.
    """
    if teacher.backend == "vllm":
        return len(prompt_token_ids(messages, teacher))
    if teacher.backend == "scripted":
        return len(messages.split())
    texts = [str(message["content"]) for message in json.loads(messages)]
    return sum(num_text_tokens(text, teacher) for text in texts) + TEMPLATE_TOKENS


def num_text_tokens(text: str, teacher: "TeacherConfig") -> int:
    """Length of a text in an endpoint's tokens: from `teacher.tokenizer` if it is set, else the number of bytes."""
    if teacher.tokenizer:
        return len(chat_tokenizer(teacher.tokenizer)(text, add_special_tokens=False)["input_ids"])
    return len(text.encode(errors="replace"))
