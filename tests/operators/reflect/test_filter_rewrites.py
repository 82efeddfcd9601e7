"""Rewrites that cannot help are refused with a reason; good ones, including real ones, are left unchanged."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from operators.columns import HELD_OUT, INSTRUCTION_REFLECTED, RESPONSE_REFLECTED, conform
from operators.read.drop_contaminated import DecontaminateConfig, evaluation_index
from operators.reflect import reflect_instructions, reflect_responses
from operators.reflect.filter_rewrites import FilterConfig, _filter, filter_rewrites, reason_against

ENGLISH = "The river rises in the mountains and flows through three countries before it reaches the sea."
FRENCH = "Le fleuve prend sa source dans les montagnes et traverse trois pays avant d'atteindre la mer."
LOOP = "Rivers are long and wide. " * 30


@pytest.mark.parametrize(
    ("original", "rewrite", "reason"),
    [
        (ENGLISH, ENGLISH.upper() + " !", "unchanged"),
        ("def f():\n    return a - b", "def f():\n    return a + b", ""),
        ("x = -5", "x = 5", ""),
        ("x = True", "x = true", ""),
        ("for x in y:\nprint(x)", "for x in y:\n    print(x)", ""),
        ("x = 1  ", "x = 1", "unchanged"),
        ("A well-known text.", "a well known text", "unchanged"),
        ("Add 3.5 and 2.", "Add 3 5 and 2.", ""),
        (ENGLISH, "better response", "prompt_words"),
        (ENGLISH, "Better Instruction.", "prompt_words"),
        (ENGLISH, "...", "prompt_words"),
        (ENGLISH, "", "prompt_words"),
        (ENGLISH, "The better man answered the call.", ""),
        (ENGLISH, "Sorry, but I cannot say.", "refusal"),
        (ENGLISH, "I apologize, but I am unable to help.", "refusal"),
        ("河流发源于山中，流经三个国家，最后注入大海。", "河流很长。" * 60, "repetitive"),
        (
            "河流发源于山中，流经三个国家，最后注入大海。",
            "河流发源于山中，流经三个国家之后，它的水量变得越来越大，并且",
            "unfinished",
        ),
        ("แม่น้ำไหลผ่านสามประเทศ", "แม่น้ำยาวมาก" * 60, "repetitive"),
        (ENGLISH, ENGLISH + "x" * 20_000, "too_long"),
        (ENGLISH, LOOP, "repetitive"),
        (ENGLISH, FRENCH, "language_drift"),
        (ENGLISH, f"[New Answer]\n{ENGLISH} It is long.", "leaked_markup"),
        (ENGLISH, f"</instruction 0a1b2c3d>\n{ENGLISH} It is long.", "leaked_markup"),
        (ENGLISH, '{"better_response": "It is long."}', "leaked_markup"),
        (ENGLISH, "I'm sorry, but I can't help with that.", "refusal"),
        (ENGLISH, "It rises in the Alps and flows through three countries before it", "unfinished"),
        (ENGLISH, f"{ENGLISH}\n\nIt is long, and where it reaches the sea it is", "unfinished"),
        (ENGLISH, "It is long, it is wide, it is deep, it is blue,", "unfinished"),
        (ENGLISH[:-1], "It rises in the Alps and flows through three countries before it", ""),
        (ENGLISH, "Rising in the Alps", ""),
        (ENGLISH, "Two of its names:\n- the river that flows through three countries to the sea", ""),
        (ENGLISH, "It rises where the snow begins to melt,\nAnd flows to where the sea and sky are one", ""),
        (ENGLISH, "It rises in the Alps.", ""),
        ("Oui", "No", ""),
        ("print(1)", "for number in range(10):\n    print(number)", ""),
        ("I'm sorry, I cannot say.", "I'm sorry, but I cannot know the weather of tomorrow.", ""),
        ("Explain this line:\n[End]", "The line [End]\n[End]\ncloses the format.", ""),
        (LOOP[:26], "A list: 1, 2, 3, 1, 2, 3, 1, 2, 3.", ""),
    ],
)
def test_reasons(original: str, rewrite: str, reason: str) -> None:
    assert reason_against(original, rewrite, FilterConfig(), is_answer=True) == reason


def test_every_check_has_a_switch() -> None:
    switches = ("unchanged", "prompt_words", "language_drift", "leaked_markup", "refusal", "unfinished")
    off = FilterConfig(max_repetition=1, max_chars=10**6, **dict.fromkeys(switches, False))
    rewrites = (LOOP, FRENCH, "[New Answer]\nYes.", "I'm sorry, no.", ENGLISH + "x" * 20_000)
    for rewrite in (ENGLISH, ENGLISH[:-1], *rewrites):
        assert reason_against(ENGLISH, rewrite, off, is_answer=True) == ""


def test_only_answers_are_checked_for_refusals() -> None:
    assert reason_against("Decline politely.", "I can't: use this phrase.", FilterConfig(), is_answer=False) == ""


def test_an_instruction_needs_no_full_stop() -> None:
    asked = "Describe the river that flows through three countries to the sea"
    assert reason_against("Describe the river.", asked, FilterConfig(), is_answer=False) == ""


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        ("Describe the river that flows through the", "unfinished"),
        ("Describe the river and its delta, its course and", "unfinished"),
        ("Describe the river that rises in", "unfinished"),
        ("This instruction requires a good and specific response", "about_itself"),
        ("The instruction is clear and specific.", "about_itself"),
        ("A better instruction would be to name the river.", "about_itself"),
        ("Is this instruction clear? Explain why.", ""),
        ("This is the longest river of Europe. Name it.", ""),
        ("Describe the river, its source and its mouth.", ""),
    ],
)
def test_a_text_that_is_not_an_instruction_is_refused(rewrite: str, reason: str) -> None:
    assert reason_against("Describe the river.", rewrite, FilterConfig(), is_answer=False) == reason


def test_instructions_of_a_good_data_set_are_not_refused(alpaca: Path) -> None:
    asked = [record["instruction"] for record in json.loads(alpaca.read_text())]
    found = [reason_against(one, other, FilterConfig(), is_answer=False) for one, other in pairwise(asked)]
    assert sum(map(bool, found)) <= 0.005 * len(found), [reason for reason in found if reason]


def test_real_answers_are_not_refused(alpaca: Path) -> None:
    """Answers of a good data set, each taken as the rewrite of its neighbour's."""
    answers = [record["output"] for record in json.loads(alpaca.read_text())]
    pairs = pairwise(answers)
    found = [reason_against(one, other, FilterConfig(), is_answer=True) for one, other in pairs]
    assert sum(map(bool, found)) <= 0.005 * len(found), [reason for reason in found if reason]


@pytest.mark.parametrize(
    ("original", "rewrite", "asked", "reason"),
    [
        (ENGLISH, "the river", "Describe the River.", "echo"),
        (ENGLISH, "a river", "Describe the River.", "shrunk"),
        (ENGLISH, "It rises in the Alps.", "Describe the River.", ""),
        ("Cat", "dog", "Choose: cat or dog?", ""),  # the original is a word of the question too
    ],
)
def test_an_answer_that_says_nothing_is_refused(original: str, rewrite: str, asked: str, reason: str) -> None:
    row = {"outcome": "", "input": "", "selected_instruction": asked, "selected_response": original}
    row |= {"better_response": rewrite, "response_reflection": "parsed"}
    config = FilterConfig(min_share=0.2)
    judged = _filter(pa.Table.from_pylist([row]), reflect_responses.ABOUT, config, None)
    expected = f"filtered:{reason}" if reason else "parsed"
    assert judged["response_reflection"].to_pylist() == [expected]


def test_the_answer_to_a_new_instruction_is_compared_with_that_instruction() -> None:
    row = {"outcome": "", "input": "Rhine", "instruction": "Name it.", "response": ENGLISH}
    row |= {"better_instruction": "Describe the river.", "instruction_reflection": "parsed"}
    for answer, status in (("river Rhine", "filtered:echo"), ("The Rhine rises in the Alps.", "parsed")):
        table = pa.Table.from_pylist([row | {"better_instruction_response": answer}])
        judged = _filter(table, reflect_instructions.ABOUT, FilterConfig(), None)
        assert judged["instruction_reflection"].to_pylist() == [status]


def reflected(**columns: str | None) -> dict[str, str | None]:
    return {
        "row_id": "a",
        "instruction": "Name a river.",
        "input": "",
        "response": "Rhine",
        "outcome": "",
        "better_instruction": "Name a long river in Europe.",
        "better_instruction_response": "The Danube.",
        "instruction_reflection": "parsed",
        **columns,
    }


@pytest.mark.usefixtures("local_ray")
class TestFilterRewrites:
    def statuses(self, *rows: dict[str, str | None], index: object = None) -> list[str | None]:
        source = ray.data.from_arrow(conform(pa.Table.from_pylist(list(rows)), INSTRUCTION_REFLECTED))
        found = filter_rewrites(source, reflect_instructions.ABOUT, FilterConfig(), index)  # type: ignore[arg-type]
        taken = found.take_all()
        assert [set(row) for row in taken] == [set(INSTRUCTION_REFLECTED.names)] * len(rows)
        return [row["instruction_reflection"] for row in taken]

    def test_only_readable_rewrites_active_are_judged(self) -> None:
        same = {"better_instruction": "name a river"}
        assert self.statuses(
            reflected(),
            reflected(**same),
            reflected(**same, outcome="dropped:duplicate"),
            reflected(instruction_reflection="rejected:refusal", better_instruction=None),
            reflected(instruction_reflection="repaired", better_instruction_response="I can't answer that."),
            reflected(better_instruction_response="Rhine"),
        ) == ["parsed", "filtered:unchanged", "parsed", "rejected:refusal", "filtered:refusal", "parsed"]

    def test_a_rewrite_that_repeats_an_evaluation_text_is_refused(self) -> None:
        held_out = reflected(row_id="h", instruction="Name the longest river in Europe, please.", outcome=HELD_OUT)
        source = ray.data.from_arrow(conform(pa.Table.from_pylist([held_out]), INSTRUCTION_REFLECTED))
        index = evaluation_index(source, None, DecontaminateConfig())
        drifted = reflected(better_instruction="Name the longest river in Europe, please!")
        assert self.statuses(reflected(), drifted, index=index) == ["parsed", "filtered:contaminated"]

    def test_a_response_is_compared_with_the_selected_one(self) -> None:
        row = reflected(
            selected_instruction="Name a river.",
            selected_response="The Rhine.",
            better_response="the rhine",
            response_reflection="parsed",
        )
        source = ray.data.from_arrow(conform(pa.Table.from_pylist([row]), RESPONSE_REFLECTED))
        [found] = filter_rewrites(source, reflect_responses.ABOUT, FilterConfig()).take_all()
        assert found["response_reflection"] == "filtered:unchanged"
        assert found["better_response"] == "the rhine"
