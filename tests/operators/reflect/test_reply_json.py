r"""Replies in JSON as teachers write them, each with its only correct reading or the reason why it has none."""

import json
from collections.abc import Iterable

import pytest

from operators.reflect.parse_replies import Parsed, Rejected, parse_reply
from operators.reflect.prompts import INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS, RESPONSE_CRITERIA, RESPONSE_SECTIONS

FINE = dict.fromkeys(RESPONSE_CRITERIA, "fine")
PLAIN = json.dumps(FINE | {"better_response": "Paris."})
OTHER = json.dumps(FINE | {"better_response": "Lyon."})


def parse(reply: str | None, finish_reason: str | None = "stop") -> Parsed | Rejected:
    return parse_reply(reply, finish_reason, "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def as_json(**changes: object) -> str:
    return json.dumps(FINE | {"better_response": "Paris."} | changes)


def written(text: str) -> str:
    """A reply whose better response is this JSON source."""
    return PLAIN.replace("Paris.", text)


def listed(names: Iterable[str], **more: object) -> str:
    """A reply whose critique is a list of objects."""
    critique = [{"criterion": name, "comment": "fine"} | more for name in names]
    return json.dumps({"critique": critique, "better_response": "Paris."})


LINES = json.dumps(json.loads(PLAIN), indent=2)
YAML = "".join(f"{name}: fine\n" for name in FINE) + "better_response: |\n  Paris.\n"
TAGS = "<critique>" + "".join(f"<{name}>{text}</{name}>" for name, text in json.loads(PLAIN).items())
READ = {
    "as asked for": PLAIN,
    "indented": json.dumps(json.loads(PLAIN), indent=2),
    "line ends of Windows": json.dumps(json.loads(PLAIN), indent=2).replace("\n", "\r\n"),
    "a byte order mark": "\ufeff" + PLAIN,
    "a fence": f"```json\n{PLAIN}\n```",
    "a fence without a language": f"```\n{PLAIN}\n```",
    "a fence in capitals": f"```JSON\n{PLAIN}\n```",
    "a fence that is not closed": f"```json\n{PLAIN}",
    "prose before": f"Here it is:\n\n{PLAIN}",
    "prose with braces before": f"Of the form {{critique, answer}}:\n{PLAIN}",
    "prose after": f"{PLAIN}\n\nI hope this helps!",
    "prose after, cut off": f"{PLAIN}\n\nI hope th",
    "prose around a fence": f"Sure!\n```json\n{PLAIN}\n```\nLet me know.",
    "thoughts before": f"<think>\nLet me see.\n</think>\n\n{PLAIN}",
    "thoughts with a draft": f"<think>\nPerhaps {OTHER}?\n</think>\n{PLAIN}",
    "thoughts that the template opened": f"Perhaps {OTHER}?\n</think>\n\n{PLAIN}",
    "empty thoughts": f"<think>\n\n</think>\n\n{PLAIN}",
    "thoughts by another name": f"<thinking>Hm.</thinking>\n{PLAIN}",
    "thoughts and a fence": f"<think>Hm.</think>\n```json\n{PLAIN}\n```",
    "a list of one": f"[{PLAIN}]",
    "twice the same": f"{PLAIN}\n{PLAIN}",
    "the form first": f"{json.dumps(dict.fromkeys([*FINE, 'better_response'], '...'))}\n{PLAIN}",
    "two objects that belong together": f"{json.dumps(FINE)}\n{json.dumps({'better_response': 'Paris.'})}",
    "single quotes": str(json.loads(PLAIN)),
    "no closing bracket": PLAIN.removesuffix("}"),
    "one bracket too many": PLAIN + "}",
    "underscores escaped": PLAIN.replace("_", "\\_"),
    "numbered names": PLAIN.replace("helpfulness", "1. helpfulness"),
    "control tokens behind it": f"{PLAIN}<|im_end|>",
    "control tokens in the text": written("Paris.<|im_end|>"),
    "encoded twice": json.dumps(PLAIN),
    "an object around it": json.dumps({"reply": json.loads(PLAIN)}),
    "the critique as an object": json.dumps({"critique": FINE, "better_response": "Paris."}),
    "more members than asked for": as_json(overall="good", score=7),
    "members in another order": json.dumps(dict(reversed(json.loads(PLAIN).items()))),
    "capitals": PLAIN.replace("helpfulness", "Helpfulness").replace("better_response", "Better_Response"),
    "camel case": PLAIN.replace("better_response", "betterResponse").replace("level_of_detail", "levelOfDetail"),
    "spaces in names": PLAIN.replace("better_response", "Better Response").replace("level_of_detail", "Level of Detail"),
    "the papers' plural": PLAIN.replace("level_of_detail", "level_of_details"),
    "the heading's name": PLAIN.replace("better_response", "better_answer"),
    "a comma after the last member": PLAIN.replace('"}', '",}'),
    "line ends inside": written("\n Paris.\n\n"),
    "headings in place of JSON": "[Critique]\n" + "\n".join(f"{n}: fine" for n in FINE) + "\n[Better Answer]\nParis.\n[End]",
    "the end of the other form": written("Paris.\\n[End]"),
    "a fence closed in the text": written("Paris.\\n```"),
    "a label": written("Better Answer: Paris."),
    "a label in bold": written("**Better Answer:** Paris."),
    "a label in brackets": written("[Better Answer]\\nParis."),
    "the property's name": written("better_response: Paris."),
    "an announcement": written("Here is a better answer: Paris."),
    "an announcement on its own line": written("Here is a better answer:\\n\\nParis."),
    "an announcement with a courtesy": written("Sure! Here's the improved response:\\nParis."),
    "an announcement of a version": written("Certainly! Here is a more detailed and improved version of the answer:\\n\\nParis."),
    "a note on the rewriting": written("Paris.\\n\\n(Note: I removed the wrong date.)"),
    "a note on the answer": written("Paris.\\n\\nNote: This answer is shorter than the original answer."),
    "an announcement after a critique": written("Based on the critique above, here is a better answer:\\n\\nParis."),
    "an announcement of what follows": written("Let me provide an improved answer:\\n\\nParis."),
    "an announcement of what is done": written("Let me rewrite the answer to be more helpful:\\n\\nParis."),
    "an announcement of what could be": written("A more detailed and helpful response could be:\\n\\nParis."),
    "an announcement of what was done": written("Here is the answer, revised for clarity:\\n\\nParis."),
    "thoughts of Kimi in the text": written("◁think▷Paris or Lyon?◁/think▷Paris."),
    "thoughts before the text": written("<think>Paris or Lyon?</think>Paris."),
    "analysis of gpt-oss": f"<|channel|>analysis<|message|>Perhaps {OTHER}?<|end|><|start|>assistant<|channel|>final<|message|>{PLAIN}<|return|>",
    "thoughts behind a word": f"Okay.\n<think>Perhaps {OTHER}?</think>\n{PLAIN}",
    "a call of a tool": '<tool_call>{"name": "reply", "arguments": ' + PLAIN + "}</tool_call>",
    "a list of one text": as_json(better_response=["Paris."]),
    "criteria with a score": json.dumps({name: {"score": 4, "comment": "fine"} for name in FINE} | {"better_response": "Paris."}),
    "criteria as lists": json.dumps({name: ["fine"] for name in FINE} | {"better_response": "Paris."}),
    "criteria in a list": json.dumps({"critique": [{name: "fine"} for name in FINE], "better_response": "Paris."}),
    "the critique as lines": json.dumps({"critique": "\n".join(f"{name}: fine" for name in FINE), "better_response": "Paris."}),
    "tags in place of JSON": "".join(f"<{name}>{text}</{name}>\n" for name, text in json.loads(PLAIN).items()),
    "typographic quotes": "{" + ", ".join(f"“{name}”: “{text}”" for name, text in json.loads(PLAIN).items()) + "}",
    "names without quotes": "{" + ", ".join(f'{name}: "{text}"' for name, text in json.loads(PLAIN).items()) + "}",
    "no commas between lines": json.dumps(json.loads(PLAIN), indent=1).replace('",\n', '"\n'),
    "colons of Chinese": PLAIN.replace('": ', '"：'),
    "spaces around": written("  Paris.  "),
    "comments": LINES.replace('"better', '// the answer, "Paris"\n  "better').replace('"fine",', '"fine", /* so */', 1),
    "a comment of Python and a comma": LINES.replace('Paris."', 'Paris.", # the answer'),
    "three quotes": LINES.replace('"Paris."', '"""Paris."""'),
    "a block of YAML": YAML,
    "a folded block of YAML in a fence": f"```yaml\n{YAML.replace('|', '>-')}```",
    "an object around the text": as_json(better_response={"text": "Paris."}),
    "its own name around the text": as_json(better_response={"better_response": "Paris."}),
    "the critique as a list": listed(FINE),
    "the critique as a list with scores": listed(FINE, score=4),
    "tags in one line": "".join(f"<{name}>{text}</{name}>" for name, text in json.loads(PLAIN).items()),
    "tags in one line, in the critique": TAGS.replace("<better", "</critique><better", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_reply_with_one_reading_is_read(name: str) -> None:
    assert parse(READ[name]) == Parsed(FINE, {"better_response": "Paris."})


@pytest.mark.parametrize(
    ("source", "text"), [("42", "42"), ("3.10", "3.10"), ("-1e5", "-1e5"), ("[7]", "7"), ("0", "0")]
)
def test_a_number_is_an_answer_with_the_digits_that_were_written(source: str, text: str) -> None:
    assert parse(PLAIN.replace('"Paris."', source)) == Parsed(FINE, {"better_response": text})


def test_long_texts_keep_their_lines_quotes_and_comments() -> None:
    def answer(reply: str) -> str:
        parsed = parse(reply)
        assert isinstance(parsed, Parsed), parsed
        return parsed.texts["better_response"]

    long = 'He said "yes".\n\n# see https://a.b//c\nprint(1)  // done.'
    assert answer(LINES.replace('"Paris."', f'"""{long}"""')) == long
    commented = LINES.replace("Paris.", json.dumps(long)[1:-1]).replace('"better', '// "so"\n"better')
    assert answer(commented) == long
    block = "better_response: |\n" + "".join(f"  {line}\n" if line else "\n" for line in long.split("\n"))
    assert answer(YAML[: YAML.index("better")] + block) == long


# from the source of the JSON text to the intended text
WRITTEN = {
    r"one\n\ntwo\n\nthree": "one\n\ntwo\n\nthree",
    "one\n\ntwo": "one\n\ntwo",
    r"one\\ntwo\\nthree": "one\ntwo\nthree",
    r"First.\\n\\n- a\\n- b": "First.\n\n- a\n- b",
    r"Use `\\n` here.": r"Use `\n` here.",
    r"print(\"a\\nb\")": 'print("a\\nb")',
    r"It is \"so\".": 'It is "so".',
    r"It\'s so.": "It's so.",
    r"$\frac{1}{2}$": r"$\frac{1}{2}$",
    r"$\\frac{1}{2}$": r"$\frac{1}{2}$",
    r"$\frac{1}{2}$ and $\theta=\beta$": r"$\frac{1}{2}$ and $\theta=\beta$",
    r"\(\bar{x} \times \nabla f \neq \rho\)": r"\(\bar{x} \times \nabla f \neq \rho\)",
    r"\[ \sum_{i} \alpha_i \]": r"\[ \sum_{i} \alpha_i \]",
    r"$\nu \to \tau$": r"$\nu \to \tau$",
    r"$$\lim_{x \to 0} \tan x \ne 1$$": r"$$\lim_{x \to 0} \tan x \ne 1$$",
    r"\(\lim_{x \to 0} \tan x\) is\none": "\\(\\lim_{x \\to 0} \\tan x\\) is\none",
    r"\[\nu \neg p\]\ne.g. here": "\\[\\nu \\neg p\\]\ne.g. here",
    r"It costs $5.\ne.g. in Rome.": "It costs $5.\ne.g. in Rome.",
    r"$5.\nnu is a word.\nto be": "$5.\nnu is a word.\nto be",
    r"\begin{cases} 1 \\ 2 \end{cases}": r"\begin{cases} 1 \ 2 \end{cases}",
    r"$\underline{x}$": r"$\underline{x}$",
    r"if x:\n\treturn 1": "if x:\n\treturn 1",
    r"\ttotal = 1\n\treturn total": "\ttotal = 1\n\treturn total",
    r"    x = 1\n    y = 2": "    x = 1\n    y = 2",
    r"one\r\ntwo": "one\ntwo",
    r"\ud83d\ude00 hello": "😀 hello",
    r"\ud83d hello": "\ufffd hello",
    r"C:\\new\\table": r"C:\new\table",
    r"\u4f60\u597d": "你好",
    r"```python\nprint(1)\n```": "```python\nprint(1)\n```",
    r"{\"a\": 1}": '{"a": 1}',
}


@pytest.mark.parametrize("source", WRITTEN)
def test_json_source_is_read_as_the_intended_text(source: str) -> None:
    assert parse(written(source)) == Parsed(FINE, {"better_response": WRITTEN[source]})


REFUSED = {
    "nothing": ("", "no_json"),
    "a brace": ("{", "no_json"),
    "a list": ("[1]", "no_json"),
    "brackets without end": ("[" * 100_000, "no_json"),
    "objects without end": ('{"a":' * 100_000, "no_json"),
    "a number without end": (PLAIN.replace('"Paris."', "9" * 5000), "no_json"),
    "the text is true": (as_json(better_response=True), "missing_section"),
    "the text is not a number": (PLAIN.replace('"Paris."', "NaN"), "missing_section"),
    "the text is an object of two": (as_json(better_response={"text": "Paris.", "note": "a"}), "missing_section"),
    "the text is an object of another name": (as_json(better_response={"note": "Paris."}), "missing_section"),
    "a list of criteria with one left out": (listed(("accuracy",)), "missing_section"),
    "a list of criteria with one empty": (listed(FINE, comment=""), "missing_section"),
    "the text is a list": (as_json(better_response=["a", "b"]), "missing_section"),
    "no text": (json.dumps(FINE), "missing_section"),
    "a criterion is null": (as_json(helpfulness=None), "missing_section"),
    "a criterion is empty": (as_json(helpfulness=" "), "missing_criterion"),
    "criteria of the schema": (as_json(**dict.fromkeys(FINE, "string")), "missing_criterion"),
    "criteria of numbers": (as_json(**dict.fromkeys(FINE, 4)), "missing_section"),
    "the schema": (json.dumps({"properties": {name: {"type": "string"} for name in [*FINE, "better_response"]}}), "missing_section"),
    "a criterion of dots": (as_json(helpfulness="..."), "missing_criterion"),
    "an empty text": (as_json(better_response="  "), "empty_section"),
    "dots": (as_json(better_response="..."), "placeholder"),
    "an ellipsis": (as_json(better_response="…"), "placeholder"),
    "a stand-in": (as_json(better_response="<your better answer here>"), "placeholder"),
    "the property's own name": (as_json(better_response="better response"), "placeholder"),
    "two different objects": (f"{PLAIN}\n{OTHER}", "several_objects"),
    "two different texts": (PLAIN.replace("}", ', "better_response": "Lyon."}'), "repeated_heading"),
    "a refusal": ("I cannot do that.", "refusal"),
    "a refusal behind a mark": ("\ufeffI'm sorry, but no.", "refusal"),
    "thoughts without end": ("<think>Hm. " + PLAIN, "unfinished_thoughts"),
    "thoughts in the text": (written("Paris.<think>Or Lyon?</think>"), "thoughts_in_text"),
    "the end of thoughts in the text": (written("Or Lyon?</think>Paris."), "thoughts_in_text"),
    "a null character": (as_json(better_response="Par\0is."), "control_character"),
    "a form feed": (as_json(better_response="Paris.\f1"), "control_character"),
    "an escape character": (as_json(better_response="\x1b[1mParis.\x1b[0m"), "control_character"),
    "a critique behind the text": (written("Paris.\\n\\nCritique:\\nIt is right."), "form_in_text"),
    "criteria behind the text": (written("Paris.\\n\\nhelpfulness: fine\\nrelevance: fine"), "critique_in_text"),
    "a bare quote in it": (json.dumps(json.loads(PLAIN), indent=2).replace("Paris.", 'Say "hi".'), "no_json"),
    "a block of YAML that breaks off": (YAML.replace("  Paris.", "Paris.\n Lyon."), "form_in_text"),
    "a reason why it is better": (written("Paris.\\n\\nWhy this is better: it is short."), "remark_in_text"),
    "what the changes do": (written("Paris.\\n\\nBy making these changes, the answer is right."), "remark_in_text"),
    "an offer to go on": (
        written("Paris.\\n\\nLet me know if you would like me to revise this answer further."),
        "remark_in_text",
    ),
    "one criterion behind the text": (written("Paris.\\n\\nAccuracy: this answer is right."), "remark_in_text"),
    "praise behind the text": (written("Paris.\\n\\nThis answer is better because it is short."), "remark_in_text"),
    "changes behind the text": (written("Paris.\\n\\nChanges made: I removed the date."), "remark_in_text"),
    "a note that may belong to it": (written("Paris.\\n\\n(Note: Times are local.)"), "remark_in_text"),
    "a heading without a mark": (written("Better Answer Paris."), "form_in_text"),
    "a heading in the text": (written("Paris.\\n[New Answer]\\nLyon."), "form_in_text"),
    "a fence that is not closed": (written("```python\\nprint(1)"), "open_fence"),
    "line ends of both kinds": (written("one\\\\ntwo\\nthree"), "literal_line_ends"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_with_no_reading_or_several_is_refused(name: str) -> None:
    reply, reason = REFUSED[name]
    assert parse(reply) == Rejected(reason)


def test_endless_white_space_is_a_cut_off_reply() -> None:
    assert parse('{"helpfulness": "fine",' + " " * 5000, "length") == Rejected("cut_off")


def test_a_whole_object_is_read_even_if_what_follows_was_cut_off() -> None:
    assert parse(f"{PLAIN}\nI hope th", "length") == Parsed(FINE, {"better_response": "Paris."})


def test_a_new_instruction_without_its_answer_is_refused() -> None:
    reply = json.dumps(dict.fromkeys(INSTRUCTION_CRITERIA, "fine") | {"better_instruction": "Name a river."})
    assert parse_reply(reply, "stop", "json", INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS) == Rejected("missing_section")


def test_the_papers_names_of_criteria_are_known() -> None:
    names = ("Complexity of the Topic", "Level of Detail Required", "Knowledge Required", "Ambiguity of the Instruction",
             "Logical Reasoning or Problem-Solving Involved")  # fmt: skip
    texts = {"New Instruction": "Name a river.", "New Answer": "Rhine."}
    parsed = parse_reply(
        json.dumps(dict.fromkeys(names, "fine") | texts), "stop", "json", INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS
    )
    assert isinstance(parsed, Parsed)
    assert list(parsed.texts.values()) == ["Name a river.", "Rhine."]


def test_lengths_are_held_to_the_configured_limits() -> None:
    def limited(reply: str) -> Parsed | Rejected:
        return parse_reply(
            reply, "stop", "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS, critique_chars=20, text_chars=30
        )

    assert limited(as_json(better_response="x" * 31)) == Rejected("over_length")
    found = limited(as_json(helpfulness="long " * 9, better_response="x" * 30))
    assert isinstance(found, Parsed)
    assert found.critique["helpfulness"] == "long long long long…"
