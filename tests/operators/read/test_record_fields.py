"""Records of every public layout give the same pair, and no column with a value is lost silently."""

import json

import pytest

from operators.read.dialogues import Exchange, Turn
from operators.read.record_fields import extra_json, is_empty, is_wanted, read_fields

ASK, CONTEXT, ANSWER = "Which city is named?", "Lena moved to Graz.", "Graz."
SYSTEM = Turn("system", "You are a pirate.")
EARLIER = (Turn("user", "Hello"), Turn("assistant", "Ahoy"))


def found(record: dict[str, object], columns: dict[str, str] | None = None, **settings: object):  # type: ignore[no-untyped-def]
    return read_fields(record, columns or {}, settings.get("pass_through", ()), settings.get("policy", "last"))  # type: ignore[arg-type]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("record", "pair"),
    [
        ({"instruction": ASK, "input": CONTEXT, "output": ANSWER}, Exchange(ASK, CONTEXT, ANSWER)),
        ({"instruction": ASK, "context": CONTEXT, "response": ANSWER}, Exchange(ASK, CONTEXT, ANSWER)),  # Dolly
        ({"Instruction": ASK, "Input": CONTEXT, "Output": ANSWER}, Exchange(ASK, CONTEXT, ANSWER)),
        ({"prompt": ASK, "completion": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"question": ASK, "answer": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"query": ASK, "response": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"problem": ASK, "solution": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"prompt": ASK, "chosen": ANSWER}, Exchange(ASK, "", ANSWER)),
        (
            {"system_prompt": "You are a pirate.", "question": ASK, "response": ANSWER},  # OpenOrca
            Exchange(ASK, "", ANSWER, (SYSTEM,)),
        ),
        (
            {
                "instruction": ASK,
                "output": ANSWER,
                "System Prompt": "You are a pirate.",
                "history": [["Hello", "Ahoy"]],
            },
            Exchange(ASK, "", ANSWER, (SYSTEM, *EARLIER)),
        ),
        ({"prompt": chat(("user", ASK)), "completion": chat(("assistant", ANSWER))}, Exchange(ASK, "", ANSWER)),  # TRL
        ({"prompt": chat(("user", ASK)), "completion": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"prompt": chat(("user", ASK)), "chosen": chat(("assistant", ANSWER))}, Exchange(ASK, "", ANSWER)),
        ({"prompt": chat(("user", ASK)), "chosen": ANSWER}, Exchange(ASK, "", ANSWER)),
        ({"chosen": chat(("user", ASK), ("assistant", ANSWER))}, Exchange(ASK, "", ANSWER)),
        (
            {
                "prompt": chat(("system", SYSTEM[1]), ("user", "Hello"), ("assistant", "Ahoy"), ("user", ASK)),
                "chosen": json.dumps(chat(("assistant", ANSWER))),
            },
            Exchange(ASK, "", ANSWER, (SYSTEM, *EARLIER)),
        ),
        ({"messages": json.dumps(chat(("user", ASK), ("assistant", ANSWER)))}, Exchange(ASK, "", ANSWER)),  # from CSV
        (
            {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}], "system": SYSTEM[1]},
            Exchange(ASK, "", ANSWER, (SYSTEM,)),
        ),
        (
            {
                "message_tree_id": "",
                "prompt": {"text": ASK, "role": "prompter", "replies": [{"text": ANSWER, "role": "assistant"}]},
            },
            Exchange(ASK, "", ANSWER),
        ),
        ({"output": "", "response": ANSWER, "instruction": ASK}, Exchange(ASK, "", ANSWER)),
        ({"messages": [], "instruction": ASK, "output": ANSWER}, Exchange(ASK, "", ANSWER)),
    ],
)
def test_layouts_of_public_data_sets_give_the_pair_and_leave_nothing(record: dict[str, object], pair: Exchange) -> None:
    assert found(record) == ([pair], [])


def test_columns_that_are_not_read_are_named_if_they_hold_something() -> None:
    record = {
        "instruction": ASK,
        "output": ANSWER,
        "category": "qa",
        "note": "",
        "score": float("nan"),
        "text": "x",
        "n": 0,
    }
    assert found(record).unread == ["category", "text", "n"]
    assert found(record | {"context": CONTEXT, "input": "used"}).unread == ["category", "text", "n", "context"]
    assert found(record, pass_through=["category", "n"]).unread == ["text"]
    with_chat = {"messages": chat(("user", ASK), ("assistant", ANSWER)), "prompt": ASK, "tools": [{"name": "look"}]}
    assert found(with_chat).unread == ["prompt", "tools"]
    named = {"messages": [{"role": "user", "content": ASK, "name": "Ann"}, *chat(("assistant", ANSWER))]}
    assert found(named).unread == ["messages.name"]


def test_a_solution_is_the_response_and_its_result_is_named_as_unread() -> None:
    numina = {"problem": "1 + 1?", "solution": "One and one is 2.", "answer": "2"}
    assert found(numina) == ([Exchange("1 + 1?", "", "One and one is 2.")], ["answer"])
    assert found({**numina, "solution": ""}) == ([Exchange("1 + 1?", "", "2")], [])


def test_the_dialogue_of_a_preference_holds_its_prompt_already() -> None:
    pair, whole = chat(("user", ASK)), chat(("user", ASK), ("assistant", ANSWER))
    assert found({"prompt": pair, "chosen": whole}) == ([Exchange(ASK, "", ANSWER)], ["prompt"])
    preference = {"prompt": pair, "chosen": chat(("assistant", ANSWER)), "rejected": chat(("assistant", "Linz."))}
    assert found(preference) == ([Exchange(ASK, "", ANSWER)], ["rejected"])


def test_other_replies_of_a_tree_are_named() -> None:
    replies = [{"text": text, "role": "assistant"} for text in (ANSWER, "Linz.", "Wien.")]
    assert found({"prompt": {"text": ASK, "role": "prompter", "replies": replies}}).unread == [
        "prompt: 2 other replies"
    ]


@pytest.mark.parametrize(
    ("text", "is_none"),
    [
        ("<noinput>", True),
        ("N/A", True),
        ("No input", True),
        ("no input.", True),
        ('"<noinput>"', True),
        ("nan", True),
        (float("nan"), True),
        (None, True),
        ("none", False),
        ("no input was given to him", False),
        ("Na", False),
    ],
)
def test_placeholders_mean_no_input(text: object, is_none: bool) -> None:
    ((pair,), _) = found({"instruction": ASK, "input": text, "output": ANSWER})
    assert (pair.input == "", pair.reason) == (is_none, "")


def test_a_response_that_pandas_wrote_for_nothing_is_empty() -> None:
    assert found({"instruction": ASK, "output": "nan"}).exchanges[0].response == ""
    assert found({"instruction": ASK, "output": "NaN is a float."}).exchanges[0].response == "NaN is a float."
    assert found({"instruction": ASK, "output": float("nan")}).exchanges[0].reason == "missing_field"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "missing_field"),
        ({"instruction": ASK}, "missing_field"),
        ({"output": ANSWER, "ask": ASK}, "missing_field"),
        ({"instruction": 7, "output": ANSWER}, "non_string_field"),
        ({"instruction": ASK, "output": True}, "non_string_field"),
        ({"instruction": ASK, "output": 42.0}, "non_string_field"),  # pandas writes 42 like this, or it was 42.0
        ({"instruction": ASK, "output": ANSWER, "history": "none"}, "malformed_messages"),
        ({"instruction": ASK, "output": ANSWER, "history": "7"}, "malformed_messages"),
        ({"instruction": ASK, "output": ANSWER, "history": [7]}, "malformed_messages"),
        ({"instruction": ASK, "output": ANSWER, "system": 3}, "malformed_messages"),
        ({"messages": "hello"}, "malformed_messages"),
        ({"messages": []}, "malformed_messages"),
        (
            {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "tool_calls": [{}]}]},
            "no_plain_answer",
        ),
    ],
)
def test_a_record_without_a_pair_has_a_reason(record: dict[str, object], reason: str) -> None:
    assert [pair.reason for pair in found(record).exchanges] == [reason]


def test_a_whole_number_is_its_digits() -> None:
    assert found({"question": "6 times 7?", "answer": 42}) == ([Exchange("6 times 7?", "", "42")], [])


@pytest.mark.parametrize(
    ("column", "ask", "reason"),
    [("images", "<image>\nWhat?", "non_text_content"), ("images", ASK, ""), ("note", "<image>", "")],
)
def test_a_text_about_a_picture_that_is_not_read_is_refused(column: str, ask: str, reason: str) -> None:
    for record in ({"instruction": ask, "output": ANSWER}, {"messages": chat(("user", ask), ("assistant", ANSWER))}):
        ((pair,), unread) = found({**record, column: ["a.png"]})
        assert (pair.reason, unread) == (reason, [column])


def test_columns_can_be_mapped() -> None:
    record = {"ask": ASK, "reply": ANSWER, "instruction": "another"}
    assert found(record, {"instruction": "ask", "response": "reply"}) == ([Exchange(ASK, "", ANSWER)], ["instruction"])
    assert found(record, {"instruction": "absent", "response": "reply"}).exchanges[0].reason == "missing_field"
    assert is_wanted("ask", {"instruction": "ask"}, ())
    assert is_wanted("Messages", {}, ())
    assert is_wanted("id", {}, ["id"])
    assert not is_wanted("id", {}, ())


@pytest.mark.parametrize(
    ("policy", "instructions"), [("last", [ASK]), ("first", ["Hello"]), ("every", ["Hello", f"{ASK}\n\n{CONTEXT}"])]
)
def test_the_policy_holds_for_a_history_beside_a_pair(policy: str, instructions: list[str]) -> None:
    record = {"instruction": ASK, "input": CONTEXT, "output": ANSWER, "history": [["Hello", "Ahoy"]]}
    assert [pair.instruction for pair in found(record, policy=policy).exchanges] == instructions


def test_columns_passed_through_are_plain_json() -> None:
    record = {"id": 7, "score": float("inf"), "tags": [float("nan"), {"a": b"x"}], "half": "\ud83d"}
    assert json.loads(extra_json(record, ["id", "score", "tags", "half", "absent"])) == {
        "id": 7,
        "score": None,
        "tags": [None, {"a": "b'x'"}],
        "half": "\ufffd",
    }
    assert extra_json(record, []) == extra_json(record, ["absent"]) == ""


def test_empty_values_are_known() -> None:
    assert all(is_empty(value) for value in (None, "", " \n", float("nan"), [], {}, b""))
    assert not any(is_empty(value) for value in (0, False, "a", [None], {"a": None}))


@pytest.mark.parametrize(
    ("system", "turns", "unread"),
    [
        ("Be brief.", [], []),
        ("Be brief.", [{"role": "system", "content": "Be brief."}], []),
        ("Be brief.", [{"role": "system", "content": "Be kind."}], ["system"]),
        ({"text": "Be brief."}, [], ["system"]),
    ],
)
def test_a_system_column_is_said_or_named(system: object, turns: list[dict[str, str]], unread: list[str]) -> None:
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = read_fields({"system": system, "messages": [*turns, *pair]}, {}, (), "last")
    assert found.unread == unread
    assert len(found.exchanges[0].before) == int(bool(turns) or not unread)
