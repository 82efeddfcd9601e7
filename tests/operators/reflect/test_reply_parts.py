"""Names of criteria and sections are recognised in all the forms that teachers write, and other names are not."""

import pytest

from operators.reflect.prompts import INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS, RESPONSE_CRITERIA, RESPONSE_SECTIONS
from operators.reflect.reply_parts import criterion_named, section_named


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("helpfulness", ("helpfulness", True)),
        ("Helpfulness", ("helpfulness", True)),
        ("1. Helpfulness", ("helpfulness", True)),
        ("Level of Details", ("level_of_detail", True)),
        ("levelOfDetail", ("level_of_detail", True)),
        ("level-of-detail", ("level_of_detail", True)),
        ("Accuracy of the answer", ("accuracy", False)),
        ("Level", ("level_of_detail", False)),
        ("Accuracy of the date", None),
        ("tone", None),
        ("", None),
        ("---", None),
    ],
)
def test_criteria_of_a_response(name: str, found: tuple[str, bool] | None) -> None:
    assert criterion_named(name, RESPONSE_CRITERIA) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Complexity of the Topic", "complexity_of_the_topic"),
        ("Complexity", "complexity_of_the_topic"),
        ("Level of Detail", "level_of_detail_required"),
        ("Ambiguity of the Instruction", "ambiguity"),
        ("Logical Reasoning or Problem-Solving Involved", "logical_reasoning_or_problem_solving"),
    ],
)
def test_the_papers_names_of_criteria(name: str, found: str) -> None:
    named = criterion_named(name, INSTRUCTION_CRITERIA)
    assert named is not None
    assert named[0] == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Better Answer", ("better_response", True)),
        ("better_response", ("better_response", True)),
        ("Improved Response", ("better_response", False)),
        ("Answer", None),
        ("Old Answer", None),
        ("Better Instruction", None),
    ],
)
def test_sections_of_a_response(name: str, found: tuple[str, bool] | None) -> None:
    assert section_named(name, RESPONSE_SECTIONS) == found


def test_sections_of_an_instruction_are_not_mixed_up() -> None:
    assert section_named("New Instruction", INSTRUCTION_SECTIONS) == ("better_instruction", True)
    assert section_named("Revised Answer", INSTRUCTION_SECTIONS) == ("better_response", False)
