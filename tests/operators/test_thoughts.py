"""Thoughts before a reply are removed in the marks of the known families, and nothing else is."""

import pytest

from operators.thoughts import (
    begins_with_thoughts,
    holds_thoughts,
    reply_after_thoughts,
    without_thoughts,
)


@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>Lyon?</think>",
        "<think>\nLyon?\n</think>\n<think>No.</think>",
        '<think duration="3">Lyon?</think>',
        "<seed:think>Lyon?</seed:think>",
        "<thought>Lyon?</thought>",
        "<reasoning>Lyon?</reasoning>",
        "[THINK]Lyon?[/THINK]",
        "◁think▷Lyon?◁/think▷",
        "<|begin_of_thought|>\nLyon?\n<|end_of_thought|>\n",
        "Thinking...\nLyon?\n...done thinking.\n\n",
        "Okay.\n<think>Lyon?</think>\n",
        "<think>Lyon?</think>\nOkay.\n<think>No.</think>\n",
        "Lyon?</think>\n",
        "Lyon?\n</think>\n</think>\n",
        "<|channel|>analysis<|message|>Lyon?<|end|><|start|>assistant<|channel|>final<|message|>",
    ],
)
@pytest.mark.parametrize("reply", ['{"a": "Paris."}', "[Critique]\nfine", "**Critique**\nfine"])
def test_thoughts_before_a_reply_are_removed(thoughts: str, reply: str) -> None:
    assert reply_after_thoughts(thoughts + reply) == reply


@pytest.mark.parametrize(
    "reply",
    [
        '{"a": "Use <think> tags</think>."}',
        "[Critique]\nfine\n<think>b</think>",
        "# Reply\n\n<think>a</think>",
        '{"a": "<|channel|>final<|message|>b"}',
        "Paris.",
    ],
)
def test_a_reply_that_begins_with_something_else_is_unchanged(reply: str) -> None:
    assert reply_after_thoughts(reply) == reply


def test_thoughts_without_an_end_and_inside_a_text_are_found() -> None:
    assert begins_with_thoughts("<think>a")
    assert begins_with_thoughts(" <seed:think>a")
    assert not begins_with_thoughts("a <think>")
    assert holds_thoughts("a</think>b")
    assert holds_thoughts('a<think mode="x">b')
    assert not holds_thoughts("<thing>a</thing> [reflection]")


def test_a_text_keeps_the_words_before_its_thoughts() -> None:
    assert without_thoughts("Okay.\n<think>a</think>b") == "Okay.\n<think>a</think>b"
    assert without_thoughts("<think>a</think>\nb") == "b"
