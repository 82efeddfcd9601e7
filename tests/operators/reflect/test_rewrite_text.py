"""Real texts are unchanged, and what a teacher puts around a text is removed."""

import json
from pathlib import Path

import pytest

from operators.reflect.prompts import RESPONSE_CRITERIA, RESPONSE_SECTIONS
from operators.reflect.reply_parts import Rejected
from operators.reflect.rewrite_text import clean_reply, clean_rewrite


def clean(text: str) -> str | Rejected:
    return clean_rewrite(text, RESPONSE_SECTIONS, RESPONSE_CRITERIA)


def test_real_texts_come_back_as_they_are(alpaca: Path) -> None:
    records = json.loads(alpaca.read_text())
    texts = [record[name] for record in records for name in ("instruction", "output")]
    changed = [text for text in texts if clean(text) not in (text.strip(), text.rstrip(), text.strip("\n"))]
    assert len(changed) <= 1, changed  # one answer of 1,500 is a row of dots


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\n\n    x = 1\n    y = 2\n", "    x = 1\n    y = 2"),
        ("\n\treturn x\n\n", "\treturn x"),
        ("  A sentence.", "A sentence."),
        ("   A sentence.\nAnother.", "A sentence.\nAnother."),
        ("---\nText.\n---", "Text."),
        ("Revised instruction: Name a river.", "Revised instruction: Name a river."),
        ("Improved Answer - It is Paris.", "It is Paris."),
        ("I've rewritten the answer as follows: It is Paris.", "It is Paris."),
        ("The improved answer is: It is Paris.", "It is Paris."),
        ("Here is a list of rivers:\n- Rhine", "Here is a list of rivers:\n- Rhine"),
        ("Here are three new ideas:\n1. Walk.", "Here are three new ideas:\n1. Walk."),
        ("Sure! Here is how to do it:\n1. Walk.", "Sure! Here is how to do it:\n1. Walk."),
        ("Paris.\r\n\r\nIt is large.", "Paris.\n\nIt is large."),
        ("Explain tides.\n\nNote: Your response should be short.", "Explain tides.\n\nNote: Your response should be short."),
        ("Read the essay.\n\nThen write a critique of it.", "Read the essay.\n\nThen write a critique of it."),
        ("A. The answer.\n\nReason: The response was angry.", "A. The answer.\n\nReason: The response was angry."),
        ("Stress begins a response.\n\nThis response is called fight or flight.",
         "Stress begins a response.\n\nThis response is called fight or flight."),
        ("---\ntitle: Hello\n---\n\nBody.", "---\ntitle: Hello\n---\n\nBody."),
        ("\\n is the character of a new line.", "\\n is the character of a new line."),
        (r"str.replace(/\n/g, ' ')", r"str.replace(/\n/g, ' ')"),
        (r"const lines = text.split(/\r?\n/)", r"const lines = text.split(/\r?\n/)"),
        ("Let me rewrite the stars: they fall.", "Let me rewrite the stars: they fall."),
        ("Paris.\n\n**Note:** I corrected the answer.", "Paris."),
        ("<answer>\nParis.\n</answer>", "Paris."),
        ("<answer 1a2b3c4d>\nParis.\n</answer 1a2b3c4d>", "Paris."),
        ("<better_response>Paris.</better_response>", "Paris."),
        ("Paris.\n</better_answer>", "Paris."),
        ("<response>\nParis.", "Paris."),
        ("<response><city>Paris</city></response>", "<response><city>Paris</city></response>"),
        ("<answer><answer>Paris.</answer></answer>", "Paris."),
        ("<p>Paris.</p>", "<p>Paris.</p>"),
        (r"He said \"hi\" to us.", 'He said "hi" to us.'),
        (r'print("a \"b\" c")', r'print("a \"b\" c")'),
        (r"M\"uller and J\"ager", r"M\"uller and J\"ager"),
        ("Response: Paris.", "Paris."),
        ("**Answer:**\n\nParis.", "Paris."),
        ("Answer: B", "Answer: B"),
        ("Output:\n[1, 2]", "Output:\n[1, 2]"),
        ("Reply: Thank you.", "Reply: Thank you."),
        ("Revised Answer\n--------------\nParis.", "Paris."),
        ("✅ Better answer: Paris.", "Paris."),
        ("Better answer (concise):\nParis.", "Paris."),
        ("Paris.\n\n[End of Answer]", "Paris."),
        ("Paris.\n\n[END BETTER ANSWER]", "Paris."),
        ("Paris.\n\n**End of Response**", "Paris."),
        ("Paris.\n\n[/Better Answer]", "Paris."),
        ("1. Better Answer: Paris.", "Paris."),
        (r"Use:\n\n```python\nprint(1)\n```", "Use:\n\n```python\nprint(1)\n```"),
        ("They kissed.\n\nThe End.", "They kissed.\n\nThe End."),
        ("Paris. [/INST]", "Paris."),
        ("Rewritten answer -> Paris.", "Paris."),
        ("Response -> stimulus is the wrong order.", "Response -> stimulus is the wrong order."),
        ("Revised: Paris.", "Paris."),
        ("|\n  Paris:\n\n    x = 1\n  Done.", "Paris:\n\n  x = 1\nDone."),
        ("> A quotation.\n> Of two lines.", "> A quotation.\n> Of two lines."),
        ("A turn ends with `<|im_end|>` in ChatML.", "A turn ends with `<|im_end|>` in ChatML."),
        ("let f = x |> g <| y", "let f = x |> g <| y"),
        ("Dear Sir,\n\nI have made the changes.\n\nYours, Ann", "Dear Sir,\n\nI have made the changes.\n\nYours, Ann"),
    ],
)  # fmt: skip
def test_wrapping_around_a_text_is_removed(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"^(\w+)\n(\d+)$", "literal_line_ends"),
        (r"Use \r\n|\n to match both.", "literal_line_ends"),
        (r"path\name", "literal_line_ends"),
        (r"A caf\u00e9 is a place.", "literal_line_ends"),
        ("Paris.<|im_end|>\n<|im_start|>user\nAnd of Spain?", "turn_in_text"),
        ("<|channel|>final<|message|>Paris.", "turn_in_text"),
        ("Paris.</s> <s> And of Spain?", "turn_in_text"),
        ("Paris.\n\n### Instruction:\nName another.", "form_in_text"),
        (
            '{"helpfulness": "fine", "relevance": "fine", "level_of_detail": "fine", "better_response": "Paris."}',
            "form_in_text",
        ),
        ("As in <instruction 1a2b3c4d>, it is Paris.", "form_in_text"),
        ("Paris.\n\n[Explanation]\nI made it short.", "form_in_text"),
        ("Critique: It is short.\n\nBetter answer: Paris.", "form_in_text"),
        ("No changes needed.", "placeholder"),
        ("Paris.\n\nHuman: Next question?\n\nAssistant: ok", "turn_in_text"),
        ("Okay, so the user wants a better answer. Paris.", "thoughts_in_text"),
        ("As per the critique, Paris.", "remark_in_text"),
        ("|\nParis.\n Lyon.", "form_in_text"),
        ("First, mix the flour.\n\n[The rest of the recipe is unchanged.]", "left_out"),
        ("Here is a better answer: " * 4, "form_in_text"),
        ("A better answer to stress is sleep.\n\nThis answer is more accurate.", "remark_in_text"),
        ("B\n\nExplanation: I changed the answer to B.", "remark_in_text"),
        ("Paris.\n\nNote: The answer has two parts now.", "remark_in_text"),
    ],
)
def test_ambiguous_wrapping_is_refused(text: str, reason: str) -> None:
    assert clean(text) == Rejected(reason)


def test_a_whole_reply_loses_its_thoughts_and_its_control_tokens() -> None:
    assert clean_reply("<think>a</think>\n<thinking>b</thinking> c<|im_end|>\n<|endoftext|>") == "c"
    assert clean_reply("<think>a") == Rejected("unfinished_thoughts")
