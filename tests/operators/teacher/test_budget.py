"""Limits on tokens and cost, and the estimated length of a prompt before its call is made."""

import json

import pytest

from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.config import TeacherConfig
from operators.teacher.prompt_tokens import TEMPLATE_TOKENS, num_prompt_tokens, num_text_tokens

ENDPOINT = TeacherConfig(backend="openai", model="big")


@pytest.mark.parametrize(
    ("limits", "used", "key"),
    [
        ({}, Tokens(10**12, 10**12), ""),
        ({"max_tokens": 100}, Tokens(60, 40), ""),
        ({"max_tokens": 100}, Tokens(60, 41), "budget.max_tokens: 100"),
        ({"max_cost": 3.0, "prompt_price": 1.0, "generated_price": 2.0}, Tokens(1_000_000, 1_000_000), ""),
        (
            {"max_cost": 2.9, "prompt_price": 1.0, "generated_price": 2.0},
            Tokens(1_000_000, 1_000_000),
            "budget.max_cost",
        ),
    ],
)
def test_a_limit_is_named_when_it_is_broken(limits: dict[str, float], used: Tokens, key: str) -> None:
    broken = BudgetConfig.model_validate(limits).exceeded_by(used)
    assert broken.startswith(key)
    assert bool(broken) == bool(key)


@pytest.mark.parametrize("text", ["plain words", "这是一个很长的中文句子。", "😀😀", "ภาษาไทย", "a\n\tb"])
def test_an_unknown_tokenizer_is_taken_to_make_a_token_of_each_byte(text: str, demo_model: str) -> None:
    messages = json.dumps([{"role": "user", "content": text}], ensure_ascii=False)
    assert num_prompt_tokens(messages, ENDPOINT) == len(text.encode()) + TEMPLATE_TOKENS
    known = ENDPOINT.model_copy(update={"tokenizer": demo_model})
    assert 0 < num_text_tokens(text, known) <= len(text.encode())
    assert num_prompt_tokens(messages, known) == num_text_tokens(text, known) + TEMPLATE_TOKENS


def test_half_an_emoji_can_be_counted() -> None:
    assert num_text_tokens("\ud83d", ENDPOINT) > 0
