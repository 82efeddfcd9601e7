"""Placeholders, excuses and gaps are found, and short answers are none."""

import json
from pathlib import Path

import pytest

from operators.reflect.placeholders import is_excuse, is_placeholder, leaves_out


@pytest.mark.parametrize(
    "text",
    ["...", "…", "--", "<better answer>", "[Your answer here]", "N/A", "TODO", "Better Response", "better instruction.",
     "[Insert better answer here]", "Insert your better answer here.", "The rewritten answer goes here.", "<string>",
     "{{better_response}}", "${better_response}", "$better_response", "Better answer to the instruction", "[...]",
     "<one sentence>", "(unchanged)"],
)  # fmt: skip
def test_placeholders(text: str) -> None:
    assert is_placeholder(text)


@pytest.mark.parametrize(
    "text",
    ["[1, 2, 3]", "(42)", "{a}", "No", "String theory", "Nothing", "string", "null", "<p>", "{{ name }}", "[x]"],
)
def test_short_answers_are_no_placeholders(text: str) -> None:
    assert not is_placeholder(text)


@pytest.mark.parametrize(
    "text",
    ["No changes needed.", "The original answer is already good.", "Same as the original answer.", "Unchanged.",
     "N/A - the original answer is correct.", "See above.", "(No changes.)", "As above.",
     "None, the answer is unchanged from the original.", "There are no improvements needed.",
     "**No revision necessary**",
     "No improvement is necessary; the answer is already accurate and complete.",
     "The given instruction is already clear and specific.", "I cannot improve this answer any further.",
     "The answer is already perfect, so no rewrite is needed.", "Keep the original answer."],
)  # fmt: skip
def test_a_text_that_only_says_that_nothing_was_changed_is_an_excuse(text: str) -> None:
    assert is_excuse(text)


@pytest.mark.parametrize(
    "text",
    ["No.", "None", "No change of state needs so much heat.", "The same as a dozen: twelve.", "See the doctor.",
     "The original answer key was lost.", "No corrections were printed in that year.", "Unchanged prices help buyers.",
     "Keep the original receipt.", "The bridge is already good."],
)  # fmt: skip
def test_an_answer_is_no_excuse(text: str) -> None:
    assert not is_excuse(text)


@pytest.mark.parametrize(
    "text",
    ["Mix the flour.\n\n[The rest of the answer remains the same.]", "Mix the flour.\n(The rest is unchanged.)",
     "Mix the flour.\n...\n[rest of the original answer]",
     "```python\nx = 1\n# ... rest of the code remains the same\n```",
     "```js\n// ... existing code ...\n```", "Mix the flour. [continued]", "Mix it.\n\n(truncated for brevity)",
     "Mix it.\n\n... (continue with the remaining steps as in the original)", "A.\n\n... the rest remains as before."],
)  # fmt: skip
def test_a_reference_to_the_original_is_a_gap(text: str) -> None:
    assert leaves_out(text)


@pytest.mark.parametrize(
    "text",
    ["She slept for the rest of the day.", "[The others are here.]\nBEN: Hello.", "Wait... the rest is silence.",
     "# rest of the world\nx = 1", "(to be continued)", "The remaining steps are easy.", "1, 2, 3, ..., 10"],
)  # fmt: skip
def test_an_ordinary_rest_is_no_gap(text: str) -> None:
    assert not leaves_out(text)


def test_no_real_text_is_an_excuse_or_has_a_gap(alpaca: Path) -> None:
    records = json.loads(alpaca.read_text())
    texts = [record[name] for record in records for name in ("instruction", "output")]
    assert [text for text in texts if is_excuse(text) or leaves_out(text)] == []
