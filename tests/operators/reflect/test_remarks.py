"""What a teacher says about its rewriting is removed or refused, and texts that speak of answers are not."""

import pytest

from operators.reflect.prompts import RESPONSE_CRITERIA
from operators.reflect.remarks import (
    criteria_of,
    ends_with_remark,
    goes_on,
    opens_with_remark,
    thinks_aloud,
    without_note,
    without_opening,
)


@pytest.mark.parametrize(
    "opening",
    ["Here's a revised response that addresses the critique:", "Here is my improved answer to the instruction:",
     "Certainly. Below is a rewritten answer that is more complete:", "A better answer would be:",
     "Taking the critique into account, here is a better response:", "To address these issues, a better answer would be:",
     "Thank you for the feedback! Here's an improved answer:", "The following is an improved answer.\n",
     "Here’s an answer that is more helpful, relevant and accurate:", "Improved version of the answer:",
     "Here is the better response you asked for:", "以下是改进后的回答：", "更好的回答：", "改善された回答：",
     "Hier ist eine bessere Antwort:", "Aquí está una respuesta mejorada:", "Voici une meilleure réponse :",
     "Вот улучшенный ответ:", "Here is a more complex instruction:",
     "Please find below the improved answer:", "A more complex version of the instruction would be:",
     "개선된 답변:", "Certainly! Here is the answer:", "Here's my response:", "Revised:", "**Improved:**",
     "As per the critique, here is a better answer:"],
)  # fmt: skip
def test_an_announcement_is_removed(opening: str) -> None:
    assert without_opening(f"{opening}\n\nParis.").strip() == "Paris."


@pytest.mark.parametrize(
    "text",
    ["Here are three new ideas:\n\n1. Walk.", "A new car is better: it starts.", "Sure! Here is how to do it:\n\nWalk.",
     "Write a better answer to this question:\n\nWhat is a river?", "Hier ist eine Liste:\n\n- Rhein",
     "To answer these questions, read:\n\nParis.", "Revised: a cat.\nOriginal: the cat.", "Improved health is a goal: walk.",
     "Based on the feedback, the team moved the date.", "Following the criticism of the plan, the city changed it.",
     "Incorporating the feedback of users, we chose blue.", "Here is the prompt: name a river."],
)  # fmt: skip
def test_another_beginning_stays(text: str) -> None:
    assert without_opening(text) == text
    assert not opens_with_remark(text)


@pytest.mark.parametrize(
    "opening",
    ["Of course! I've improved the answer below.", "I have rewritten the response so that it is clear.",
     "Now, with all of that in mind, I would like to give a better and shorter answer:",
     "As per the critique, I name the city.", "Incorporating the feedback:", "To address the criticism, the city is named."],
)  # fmt: skip
def test_an_unusual_announcement_is_found(opening: str) -> None:
    assert without_opening(f"{opening}\n\nParis.") == f"{opening}\n\nParis."
    assert opens_with_remark(f"{opening}\n\nParis.")


@pytest.mark.parametrize(
    "tail",
    ["**Key improvements:**\n\n- It is shorter.\n- The date is right.", "---\n\n**Changes made:**\n1. Removed the date.",
     "### Why this is better\n\nIt is short and exact.\n\nIt names the city.", "(I removed the date and made the answer short.)",
     "*This revised answer adds the name of the city.*", "[Note: the answer was shortened.]",
     "P.S. I changed the answer as you asked.", "Rationale: The original answer was vague.",
     "The answer now includes the name of the city.", "Score: 9/10 for helpfulness, 10/10 for accuracy.",
     "Note: In this rewrite, I have focused on the city.", "Explanation of improvements:\nThe date was wrong.",
     "Please let me know if you need any further improvements to the answer.",
     "Overall, this response improves on the original by naming the city.",
     "Compared to the original, this one names the city directly.", "（注：我修改了原回答中的日期。）", "改进之处：\n- 更简短",
     "(Hinweis: Ich habe das Datum korrigiert.)", "Summary of changes:\n- shorter", "What I changed:\n\n- The date.",
     "This makes the instruction more challenging.", "As an AI language model, I revised the answer.",
     "This is a better answer because it is short.", "These changes make the answer clearer.",
     "By adding the date, the response becomes more accurate.", "Score: 9/10", "**Overall score:** 9.5 out of 10.",
     "Improvements: added the river.", "---\n*Changes: added detail*", "Corrections made:\n- fixed the date"],
)  # fmt: skip
def test_a_remark_at_the_end_is_found(tail: str) -> None:
    assert ends_with_remark(f"Paris.\n\n{tail}", RESPONSE_CRITERIA)


@pytest.mark.parametrize(
    "tail",
    ["Rating: 4/5 stars.", "Let me know if you have any questions.", "I changed my mind.", "(I added the salt.)",
     "What changed everything was the steam engine.", "Why this matters: cities grow.",
     "Compared to the original, the remake is short.", "Improvements in health followed.", "It has 2/5 of the votes.",
     "This is a new prompt for the artist.", "Salt makes the soup better.", "Changes: see the list.", "Improvements: none planned.",
     "Score: Home 3, Away 2.", "The score was 9/10.", "Changes:\n- The bridge was built."],
)  # fmt: skip
def test_another_end_is_no_remark(tail: str) -> None:
    assert not ends_with_remark(f"Paris.\n\n{tail}", RESPONSE_CRITERIA)


@pytest.mark.parametrize(
    ("text", "is_thought"),
    [
        ("Okay, so the user wants a better answer. Paris is it.", True),
        ("Hmm, the user asks for a city.\n\nParis.", True),
        ("Alright, let me see. I need to rewrite the answer so that it is short.", True),
        ("Well, first we have to improve the answer by naming the city.", True),
        ("Okay, let's start with the dough.", False),
        ("The user wants a fast page, so cache it.", False),
        ("Well, I need to buy a better car.", False),
        ("So, we should leave.", False),
    ],
)
def test_thoughts_without_marks_are_found(text: str, is_thought: bool) -> None:
    assert thinks_aloud(text) == is_thought


@pytest.mark.parametrize(
    ("text", "is_next"),
    [
        ("Paris.\n\nHuman: Next question?\n\nAssistant: ok", True),
        ("Paris.\n\n**User:** And Spain?", True),
        ("Here is a conversation:\n\nUser: Hi.\n\nAssistant: Hello.", False),
        ("Assistant: Hello.\n\nUser: Hi.", False),
        ("# Support\n\nAI: Hello.\n\nHuman: Hi.", False),
        ("Paris.\n\nHuman rights: a history.", False),
        ("Paris.\n\nThe user: a person.", False),
    ],
)
def test_a_next_turn_behind_the_answer_is_found(text: str, is_next: bool) -> None:
    assert goes_on(text) == is_next


def test_a_note_about_the_rewriting_is_removed() -> None:
    assert without_note("Paris.\n\n(Note: I removed the wrong date.)").strip() == "Paris."
    assert without_note("Paris.\n\nNote: Times are local.") == "Paris.\n\nNote: Times are local."


def test_criteria_at_the_beginning_of_lines_are_named() -> None:
    assert criteria_of(["- **Helpfulness:** fine", "2. accuracy: fine", "tone: fine"], RESPONSE_CRITERIA) == {
        "helpfulness",
        "accuracy",
    }
