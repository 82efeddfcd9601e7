"""A call's messages as the teacher's own tokens."""

import json
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4)
def chat_tokenizer(model: str) -> Any:
    """The model's tokenizer, with its chat template; loaded once a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def prompt_token_ids(messages: str, model: str) -> list[int]:
    """Render a call's messages with the model's chat template, up to where the reply begins."""
    ids: list[int] = chat_tokenizer(model).apply_chat_template(
        json.loads(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids
