"""Lengths of prompts in tokens are exact if the tokenizer is known, and otherwise never too small."""

import json

import pytest
from transformers import AutoTokenizer

from operators.teacher.config import TeacherConfig
from operators.teacher.prompt_tokens import TEMPLATE_TOKENS, num_prompt_tokens, num_text_tokens, prompt_token_ids

TEXTS = ("Name three colours.", "给出三种颜色。", "def f():\n    return '\\n'", "🤖" * 5, "")


def messages(*texts: str) -> str:
    return json.dumps([{"role": "user", "content": text} for text in texts])


def endpoint(tokenizer: str = "") -> TeacherConfig:
    return TeacherConfig(backend="openai", model="big", base_url="http://127.0.0.1:1/v1", tokenizer=tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_never_fewer_than_the_tokens(text: str, demo_model: str) -> None:
    assert num_text_tokens(text, endpoint()) == len(text.encode())
    assert num_text_tokens(text, endpoint(demo_model)) <= num_text_tokens(text, endpoint())
    assert num_prompt_tokens(messages(text), endpoint()) == len(text.encode()) + TEMPLATE_TOKENS


@pytest.mark.parametrize("text", TEXTS)
def test_an_estimate_by_the_tokenizer_holds_the_whole_prompt(text: str, demo_model: str) -> None:
    engine = TeacherConfig(backend="vllm", model=demo_model)
    exact = num_prompt_tokens(messages(text), engine)
    assert exact == len(prompt_token_ids(messages(text), engine))
    assert exact <= num_prompt_tokens(messages(text), endpoint(demo_model))


def test_half_a_surrogate_pair_has_a_length_too() -> None:
    assert num_text_tokens("a\ud83d", endpoint()) == 2


def test_a_prompt_has_one_beginning_and_ends_where_the_reply_begins(demo_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = prompt_token_ids(json.dumps([{"role": "user", "content": "Hello"}]), TeacherConfig(model=demo_model))
    text = tokenizer.decode(ids)
    assert text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 1
