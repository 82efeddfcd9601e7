import json
from typing import Any

import pytest

from operators.browse.views import render, reply_view, row_view


def a_row(**columns: Any) -> dict[str, Any]:
    return {"row_id": "r1", "instruction": "old", "input": "", "response": "answer", "outcome": "both", **columns}


@pytest.mark.parametrize(
    ("columns", "after", "not_kept"),
    [
        ({}, "old", None),
        ({"better_instruction": "new"}, "new", None),
        ({"better_instruction": "new", "selected_instruction": "old"}, "old", "new"),
        ({"better_instruction": "new", "selected_instruction": "new", "final_instruction": "new"}, "new", None),
    ],
)
def test_the_text_that_the_stage_goes_on_with_stands_after(
    columns: dict[str, str], after: str, not_kept: str | None
) -> None:
    instruction = row_view(a_row(**columns))["texts"][0]
    assert (instruction["before"]["text"], instruction["after"]["text"]) == ("old", after)
    assert (instruction["not_kept"] and instruction["not_kept"]["text"]) == not_kept


def test_columns_that_the_card_does_not_know_are_shown_too() -> None:
    view = row_view(a_row(ifd_original=0.5, why="a new stage says so", document_lengths=[3, 4], escaped=False))
    assert view["scores"] == {"IFD of the original": 0.5}
    assert {name: value["text"] for name, value in view["rest"].items()} == {
        "why": "a new stage says so",
        "document_lengths": "[3, 4]",
    }


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ("ifd_rifd", {"IFD of the original", "r-IFD of the rewrite"}),
        ("", {"IFD of the original", "r-IFD of the rewrite"}),
        ("reward", {"Reward of the original", "Reward of the rewrite"}),
        ("perplexity", {"Perplexity of the original", "Perplexity of the rewrite"}),
        ("judge", {"Judge of the original", "Judge of the rewrite"}),
    ],
)
def test_scores_have_the_name_of_their_measure(policy: str, names: set[str]) -> None:
    assert set(row_view(a_row(ifd_original=0.5, rifd_better_response=7.0), policy)["scores"]) == names


def test_a_prompt_that_was_not_searched_for_to_the_end_is_not_called_missing() -> None:
    record = {"call_key": "k", "row_id": "r1", "reply": "yes", "prompt_tokens": 0, "generated_tokens": 0}
    for out_of_time, said in ((True, "not found in the time of one page"), (False, "not stored")):
        view = reply_view(record, None, None, out_of_time=out_of_time)
        html = render("row.html.j2", title="", storage="", stages=[], replies=[("s", view)], more=[], out_of_time=False)
        assert f"The prompt of this call was {said}." in html


def test_turns_that_are_not_json_are_shown_as_they_are() -> None:
    turns = json.dumps([{"role": "system", "content": "Be brief."}])
    view = row_view(a_row(turns_before=turns, turns_after="[{]"))
    assert [turn["role"] for turn in view["turns"]["turns_before"]] == ["system"]
    assert view["turns"]["turns_after"] == [{"role": "", "content": {"text": "[{]", "num_chars": 3}}]


def test_a_failed_call_has_its_error_and_no_reply() -> None:
    record = {"call_key": "k", "row_id": "r1", "reply": None, "error": "401 no such key", "prompt_tokens": 0}
    view = reply_view(record, None, None)
    assert (view["reply"]["text"], view["error"]["text"], view["turns"]) == ("", "401 no such key", None)


def test_every_text_is_escaped() -> None:
    attack = "</p><script>alert(1)</script>\u202e"
    row = row_view(a_row(**dict.fromkeys(("instruction", "final_response", "origin", "outcome", "why"), attack)))
    html = render(
        "row.html.j2",
        title=attack,
        storage=attack,
        stages=[{"name": attack, "refresh": attack, "row": row}],
        replies=[(attack, reply_view({"reply": attack, "error": attack, "call_key": attack}, attack, 1.0))],
        more=[(attack, "/replies/x")],
        out_of_time=False,
    )
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;") > 8
