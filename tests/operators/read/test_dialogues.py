"""Dialogues of every public form become the same turns, and no turn is lost."""

import json

import pytest

from operators.read.dialogues import Dialogue, Exchange, Turn, as_json, exchanges_of, read_dialogue, tree_path

ASKED, ANSWER = Turn("user", "Name a bird."), Turn("assistant", "A wren.")
AGAIN, THEN = Turn("user", "And a fish?"), Turn("assistant", "A carp.")
SYSTEM = Turn("system", "Be brief.")
CALL = Turn("assistant", '[{"name":"look"}]', is_call=True)
RESULT = Turn("tool", "carp, pike")


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize(
    "listed",
    [
        messages(SYSTEM, ASKED, ANSWER),
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Name a bird."},
            {"from": "gpt", "value": "A wren."},
        ],
        [
            {"Role": None, "role": "System", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "prompter", "text": "Name a bird."},
            {"role": "assistant", "text": "A wren."},
        ],
        [*messages(SYSTEM), {"human": "Name a bird.", "assistant": "A wren."}],
    ],
    ids=["openai", "sharegpt", "parts", "pairs"],
)
def test_forms_of_a_dialogue_give_the_same_turns(listed: list[object]) -> None:
    assert read_dialogue(listed) == Dialogue([SYSTEM, ASKED, ANSWER])


def test_tool_calls_are_kept_as_json_and_are_not_an_answer() -> None:
    listed = [
        {"role": "user", "content": "Name a fish."},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "carp, pike", "tool_call_id": "1"},
        {"role": "assistant", "content": "A carp."},
    ]
    found = read_dialogue(listed)
    assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(found.turns[1].content) == [{"name": "look"}]
    assert found.unread == ("tool_call_id",)
    assert list(exchanges_of(found.turns, "last")) == []  # the question is not directly followed by an answer
    assert [each.response for each in exchanges_of([*found.turns, ASKED, ANSWER], "last")] == ["A wren."]


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (None, "malformed_messages"),
        ([], "malformed_messages"),
        ("hello", "malformed_messages"),
        ([1], "malformed_messages"),
        ([{"role": "user"}], "malformed_messages"),
        ([{"role": "narrator", "content": "Once."}], "malformed_messages"),
        (messages(ASKED, ASKED, ANSWER), "malformed_messages"),
        (messages(ASKED, ANSWER, ANSWER), "malformed_messages"),
        (messages(ASKED, ANSWER, SYSTEM), "malformed_messages"),
        (messages(SYSTEM, ANSWER), "malformed_messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "non_text_content"),
        (messages(ANSWER, ASKED, ANSWER, AGAIN), ""),  # a greeting first, a question without an answer last
    ],
)
def test_a_record_that_is_not_a_dialogue_has_a_reason(listed: object, reason: str) -> None:
    assert read_dialogue(listed).reason == reason


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("last", [Exchange(AGAIN.content, "", THEN.content, (SYSTEM, ASKED, ANSWER), (AGAIN,))]),
        ("first", [Exchange(ASKED.content, "", ANSWER.content, (SYSTEM,), (AGAIN, THEN, AGAIN))]),
        (
            "every",
            [
                Exchange(ASKED.content, "", ANSWER.content, (SYSTEM,)),
                Exchange(AGAIN.content, "", THEN.content, (SYSTEM, ASKED, ANSWER), (AGAIN,)),
            ],
        ),
    ],
)
def test_the_policy_says_which_pair(policy: str, expected: list[Exchange]) -> None:
    turns = [SYSTEM, ASKED, ANSWER, AGAIN, THEN, AGAIN]
    assert list(exchanges_of(turns, policy)) == expected  # type: ignore[arg-type]
    for pair in exchanges_of(turns, "last"):
        assert [*pair.before, Turn("user", pair.instruction), Turn("assistant", pair.response), *pair.after] == turns


def test_a_pair_without_text_is_used_only_if_there_is_no_other() -> None:
    silent = [Turn("user", " "), Turn("assistant", "Yes?")]
    assert [each.instruction for each in exchanges_of([ASKED, ANSWER, *silent], "last")] == [ASKED.content]
    assert [each.response for each in exchanges_of(silent, "last")] == ["Yes?"]


def test_tool_turns_stay_where_they_were() -> None:
    (pair,) = exchanges_of([ASKED, CALL, RESULT, THEN, AGAIN, THEN], "last")
    assert pair.before == (ASKED, CALL, RESULT, THEN)
    assert json.loads(as_json(pair.before))[2] == {"role": "tool", "content": "carp, pike"}
    assert as_json(pair.after) == ""


def test_a_tree_gives_its_best_path_and_the_number_of_other_messages() -> None:
    worse = {"role": "assistant", "text": "Dunno.", "rank": 1, "replies": [{"role": "prompter", "text": "Oh?"}]}
    best = {"role": "assistant", "text": "A wren.", "rank": 0, "replies": [{"role": "prompter", "text": "Thanks"}]}
    path, others = tree_path({"role": "prompter", "text": "Name a bird.", "replies": [worse, best]})
    assert read_dialogue(path).turns == [ASKED, ANSWER]
    assert others == 3, "the unanswered thanks too"
    assert tree_path("no tree") == ([], 0)


def test_replies_that_are_not_a_list_are_ignored() -> None:
    root = {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "replies": 3}]}
    assert tree_path(root) == ([root, root["replies"][0]], 0)  # type: ignore[index]


@pytest.mark.parametrize(
    ("listed", "turns", "unread"),
    [
        ([{"system": "Be brief.", "human": "Name a bird.", "assistant": "A wren."}], [SYSTEM, ASKED, ANSWER], ()),
        ([{"human": "Name a bird.", "assistant": "A wren.", "score": 3}], [ASKED, ANSWER], ("score",)),
        ([{"human": "Name a bird.", "question": "?", "bot": "A wren."}], [ASKED, ANSWER], ("question",)),
        (
            [
                {"system": "Be brief.", "human": "Name a bird.", "assistant": "A wren."},
                {"system": "Be brief.", "human": "And a fish?", "assistant": "A carp."},
            ],
            [SYSTEM, ASKED, ANSWER, AGAIN, THEN],
            (),
        ),
        (
            [{"role": "user", "content": "Name a bird.", "text": "Or two."}, {"role": "assistant", "text": "A wren."}],
            [ASKED, ANSWER],
            ("text",),
        ),
        (
            [{"role": "user", "content": "", "text": "Name a bird."}, {"role": "assistant", "content": "A wren."}],
            [ASKED, ANSWER],
            (),
        ),
        (
            [{"role": "user", "author": "Bob", "content": "Name a bird."}, {"from": "gpt", "value": "A wren."}],
            [ASKED, ANSWER],
            ("author",),
        ),
    ],
)
def test_a_text_that_is_not_read_is_named(listed: list[object], turns: list[Turn], unread: tuple[str, ...]) -> None:
    assert read_dialogue(listed) == Dialogue(turns, "", unread)


def test_another_system_prompt_in_a_later_pair_is_no_dialogue() -> None:
    pairs = [{"system": text, "human": text, "assistant": "Yes."} for text in ("one", "two")]
    assert read_dialogue(pairs).reason == "malformed_messages"


def test_an_unanswered_question_at_the_end_of_a_tree_is_counted() -> None:
    ending = {"role": "prompter", "text": "And then?", "replies": []}
    root = {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Yes.", "replies": [ending]}]}
    path, others = tree_path(root)
    assert (len(path), others) == (2, 1)
