"""Replies with headings as teachers write them, each with its only correct reading or the reason why it has none."""

import json

import pytest

from operators.reflect.parse_replies import Parsed, Rejected, parse_reply
from operators.reflect.prompts import INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS, RESPONSE_CRITERIA, RESPONSE_SECTIONS

CRITIQUE = "\n".join(f"{name.replace('_', ' ')}: fine" for name in RESPONSE_CRITERIA)
FINE = dict.fromkeys(RESPONSE_CRITERIA, "fine")


def parse(reply: str | None, finish_reason: str | None = "stop") -> Parsed | Rejected:
    return parse_reply(reply, finish_reason, "delimited", RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def delimited(answer: str = "Paris.", critique: str = CRITIQUE, end: str = "\n[End]") -> str:
    return f"[Critique]\n{critique}\n[Better Answer]\n{answer}{end}"


READ = {
    "as asked for": delimited(),
    "line ends of Windows": delimited().replace("\n", "\r\n"),
    "line ends of old Macs": delimited().replace("\n", "\r"),
    "a byte order mark": "\ufeff" + delimited(),
    "blank lines everywhere": "\n\n" + delimited().replace("\n", "\n\n") + "\n\n",
    "spaces before and after headings": delimited().replace("[", "  [").replace("]", "]  "),
    "lower case": delimited().replace("Critique", "critique").replace("Better Answer", "better answer"),
    "upper case": delimited().replace("Critique", "CRITIQUE").replace("Better Answer", "BETTER ANSWER"),
    "end in lower case": delimited(end="\n[end]"),
    "end in upper case": delimited(end="\n[END]"),
    "end with a full stop": delimited(end="\n[End]."),
    "end on the last line of the answer": delimited(end=" [End]"),
    "end directly behind the answer": delimited(end="[End]"),
    "end in bold": delimited(end="\n**[End]**"),
    "end in bold without brackets": delimited(end="\n**End**"),
    "end as a heading": delimited(end="\n## End"),
    "end without brackets": delimited(end="\nEnd"),
    "end in capitals without brackets": delimited(end="\n\nEND"),
    "closing tag": delimited(end="\n[/End]"),
    "end of what": delimited(end="\n[End of Answer]"),
    "end of the form": delimited(end="\n[End of Form]"),
    "nothing after a whole sentence": delimited(end=""),
    "bold headings": delimited().replace("[", "**[").replace("]", "]**"),
    "bold without brackets": delimited().replace("[Critique]", "**Critique**").replace("[Better Answer]", "**Better Answer**"),
    "bold with a colon inside": delimited().replace("[Better Answer]", "**Better Answer:**"),
    "bold with a colon behind": delimited().replace("[Better Answer]", "**Better Answer**:"),
    "markdown headings": delimited().replace("[Critique]", "## Critique").replace("[Better Answer]", "## Better Answer"),
    "markdown headings with brackets": delimited().replace("[", "### ["),
    "numbered headings": delimited().replace("[Critique]", "1. Critique:").replace("[Better Answer]", "2. Better Answer:"),
    "colon behind brackets": delimited().replace("]", "]:"),
    "colons without brackets": delimited().replace("[Critique]", "Critique:").replace("[Better Answer]", "Better answer:"),
    "names alone": delimited().replace("[Critique]", "Critique").replace("[Better Answer]", "Better Answer"),
    "the answer behind its heading": delimited().replace("[Better Answer]\n", "[Better Answer] "),
    "the answer behind a colon": delimited().replace("[Better Answer]\n", "Better Answer: "),
    "the answer behind bold": delimited().replace("[Better Answer]\n", "**Better Answer:** "),
    "another adjective": delimited().replace("Better Answer", "Improved Answer"),
    "another noun": delimited().replace("Better Answer", "Better Response"),
    "full-width brackets": delimited().replace("[", "【").replace("]", "】"),
    "no heading of the critique": delimited().removeprefix("[Critique]\n"),
    "prose before": "Sure, here is my critique.\n\n" + delimited(),
    "prose after": delimited() + "\n\nI hope this helps!",
    "thoughts before": "<think>\nThe form is\n[Better Answer]\n...\n</think>\n" + delimited(),
    "thoughts that the template opened": "The form has [Critique]\nand so on.\n</think>\n\n" + delimited(),
    "thoughts of Mistral": "[THINK]Hm.[/THINK]" + delimited(),
    "a fence around all": f"```\n{delimited()}\n```",
    "a fence with a language around all": f"Here:\n```text\n{delimited()}\n```\nDone.",
    "rules between parts": delimited().replace("[Better Answer]", "---\n[Better Answer]").replace("\n[End]", "\n---\n[End]"),
    "end twice": delimited(end="\n[End]\n[End]"),
    "tags": f"<critique>\n{CRITIQUE}\n</critique>\n<better_answer>\nParis.\n</better_answer>",
    "closing tags": delimited(critique=f"{CRITIQUE}\n[/Critique]", end="\n[/Better Answer]\n[End]"),
    "control tokens behind the end": delimited() + "<|eot_id|>",
    "bold brackets with a colon": delimited().replace("[Better Answer]", "**[Better Answer]:**"),
    "underlined headings": delimited().replace("[Better Answer]", "Better Answer\n============="),
    "italics": delimited().replace("[Better Answer]", "*Better Answer*"),
    "emphasis with underscores": delimited().replace("[Better Answer]", "__Better Answer__"),
    "escaped brackets": delimited().replace("[", "\\[").replace("]", "\\]"),
    "quoted by >": "> " + delimited().replace("\n", "\n> ").replace("> Paris.", "Paris."),
    "each section closed, as in the papers": delimited(critique=f"{CRITIQUE}\n[End]"),
    "JSON in place of headings": '{"helpfulness":"fine","relevance":"fine","accuracy":"fine","level_of_detail":"fine",'
    '"better_response":"Paris."}',
    "line ends in letters": delimited().replace("\n", "\\n"),
    "numbered criteria": delimited(critique="\n".join(f"{n}. {line}" for n, line in enumerate(CRITIQUE.split("\n"), 1))),
    "numbered with brackets": delimited(critique="\n".join(f"{n}) {line}" for n, line in enumerate(CRITIQUE.split("\n"), 1))),
    "criteria in a list": delimited(critique="\n".join(f"- {line}" for line in CRITIQUE.split("\n"))),
    "bold criteria": delimited(critique=CRITIQUE.replace(":", ":**").replace("\n", "\n**").replace("helpf", "**helpf")),
    "bold criteria in a list": delimited(critique="\n".join(f"* **{line.replace(':', '**:')}" for line in CRITIQUE.split("\n"))),
    "capitals": delimited(critique=CRITIQUE.title().replace("Fine", "fine")),
    "underscores": delimited(critique=CRITIQUE.replace("level of detail", "level_of_detail")),
    "the papers' plural": delimited(critique=CRITIQUE.replace("level of detail", "Level of Details")),
    "dashes": delimited(critique=CRITIQUE.replace(": ", " - ")),
    "long dashes": delimited(critique=CRITIQUE.replace(": ", " — ")),
    "criteria with marks out of ten": delimited(critique=CRITIQUE.replace(":", " (8/10):")),
    "what is said on the next line": delimited(critique=CRITIQUE.replace(": ", ":\n")),
    "criteria as headings": delimited(critique="### " + CRITIQUE.replace(": ", "\n").replace("\n", "\n### ").replace("### fine", "fine")),
    "criteria in one line": delimited(critique=CRITIQUE.replace("\n", "; ")),
    "equals signs around headings": delimited().replace("[Critique]", "=== Critique ===").replace("[Better Answer]", "=== Better Answer ==="),
    "dashes around headings": delimited().replace("[Better Answer]", "--- Better Answer ---"),
    "braces": delimited().replace("[", "{").replace("]", "}"),
    "round brackets": delimited().replace("[", "(").replace("]", ")"),
    "corner brackets": delimited().replace("[", "「").replace("]", "」"),
    "double brackets": delimited(critique=CRITIQUE).replace("[Critique]", "[[Critique]]").replace("[Better Answer]", "[[Better Answer]]"),
    "emojis": delimited().replace("[Critique]", "📝 **Critique**").replace("[Better Answer]", "✅ **Better Answer**"),
    "parts": delimited().replace("[Critique]", "Part 1: Critique").replace("[Better Answer]", "Part 2: Better Answer"),
    "Roman numbers": delimited().replace("[Critique]", "I. Critique").replace("[Better Answer]", "II. Better Answer"),
    "letters": delimited().replace("[Critique]", "A. Critique").replace("[Better Answer]", "B. Better Answer"),
    "a heading closed by its mark": delimited().replace("[Better Answer]", "# **Better Answer** #"),
    "headings in HTML": delimited().replace("[Critique]", "<h2>Critique</h2>").replace("[Better Answer]", "<b>Better Answer</b>"),
    "an article": delimited().replace("[Better Answer]", "[A Better Answer]"),
    "an answer to what": delimited().replace("[Better Answer]", "[The Better Answer to the Instruction]"),
    "the noun alone": delimited().replace("[Better Answer]", "[Answer]"),
    "one more adjective": delimited().replace("[Better Answer]", "[Enhanced Answer]"),
    "an arrow": delimited().replace("[Better Answer]", "Better Answer →"),
    "hard spaces": delimited(critique=CRITIQUE.replace(" ", "\u00a0")),
    "half of an end": delimited(end="\n[End"),
    "the other half": delimited(end="\nEnd]"),
    "end in round brackets": delimited(end="\n(End)"),
    "end with an exclamation mark": delimited(end="\n[End!]"),
    "end in German": delimited(end="\n[Ende]"),
    "done": delimited(end="\n[Done]"),
    "end of what, without of": delimited(end="\n[End Better Answer]"),
    "end of what, without brackets": delimited(end="\nEND OF ANSWER"),
    "end of what, as a sentence": delimited(end="\n---\nEnd of response."),
    "end between dashes": delimited(end="\n\n--- End ---"),
    "criteria in a table": delimited(critique="| Criterion | Comment |\n|---|---|\n" + "\n".join(f"| {line.replace(': ', ' | ')} |" for line in CRITIQUE.split("\n"))),
    "criteria with arrows": delimited(critique=CRITIQUE.replace(":", " →")),
    "criteria with equals signs": delimited(critique=CRITIQUE.replace(":", " =")),
    "criteria with ticks": delimited(critique="✔ " + CRITIQUE.replace("\n", "\n✔ ")),
    "criteria in another order": delimited(critique="\n".join(reversed(CRITIQUE.split("\n")))),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_reply_with_one_reading_is_read(name: str) -> None:
    assert parse(READ[name]) == Parsed(FINE, {"better_response": "Paris."})


REFUSED = {
    "nothing": ("", "missing_section"),
    "prose only": ("Paris.", "missing_section"),
    "no end and no whole sentence": (delimited("Paris is the", end=""), "missing_section"),
    "a heading twice": (delimited("[Better Answer]\nParis."), "repeated_heading"),
    "a heading in the critique": (delimited(critique=f"{CRITIQUE}\n[Better Answer]"), "repeated_heading"),
    "two ends": (delimited("Paris.\n[End]\nOr Lyon."), "repeated_heading"),
    "the form and then a reply": (f"{delimited('...')}\n{delimited()}", "repeated_heading"),
    "parts in another order": (f"[Better Answer]\nParis.\n[Critique]\n{CRITIQUE}\n[End]", "sections_out_of_order"),
    "an empty answer": (delimited("", end="[End]"), "empty_section"),
    "an answer of blank lines": (delimited(" \n\n "), "empty_section"),
    "a criterion left out": (delimited(critique="helpfulness: fine"), "missing_criterion"),
    "an empty criterion": (
        delimited(critique=CRITIQUE.replace("helpfulness: fine", "helpfulness:")),
        "missing_criterion",
    ),
    "an empty criterion, last": (delimited(critique=CRITIQUE.removesuffix(" fine")), "missing_criterion"),
    "an empty criterion before another name": (
        delimited(critique=CRITIQUE.replace("helpfulness: fine", "helpfulness:\ntone: fine")),
        "missing_criterion",
    ),
    "the form's own dots": (delimited(critique=CRITIQUE.replace("fine", "...")), "missing_criterion"),
    "a criterion in brackets of the form": (
        delimited(critique=CRITIQUE.replace("helpfulness: fine", "helpfulness: <your sentence>")),
        "missing_criterion",
    ),
    "another section behind the answer": (delimited("Paris.\n[Explanation]\nIt is right."), "form_in_text"),
    "the form's own dots as the answer": (delimited("..."), "placeholder"),
    "thoughts without an end": ("<think>\nWell,\n" + delimited(), "unfinished_thoughts"),
    "thoughts in the answer": (delimited("Paris, I think. <think>Or Lyon?</think> Yes."), "thoughts_in_text"),
    "a refusal": ("I'm sorry, but I can't help with that.", "refusal"),
    "a refusal of another kind": ("I'm unable to help with this request.", "refusal"),
    "the critique again behind the answer": (delimited(f"Paris.\n\n{CRITIQUE}"), "critique_in_text"),
    "a heading of the critique behind the answer": (delimited("Paris.\n\nCritique:\nIt is right now."), "form_in_text"),
    "a last line of Ruby and no end": (delimited("def f\n  puts 1\nend", end=""), "missing_section"),
    "a last line of SQL and no end": (delimited("CASE WHEN a\n  THEN 1\nEND", end=""), "missing_section"),
    "an end of thoughts in the answer": (delimited("Paris or Lyon?\n</think>\nParis."), "thoughts_in_text"),
    "broken JSON in lines": (
        "{\n" + "".join(f'  "{name}": "fine",\n' for name in RESPONSE_CRITERIA) + '  "better_response": "Say "hi"."\n}',
        "missing_section",
    ),
    "a fence that is not closed": (delimited("```python\nprint(1)"), "open_fence"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_with_no_reading_or_several_is_refused(name: str) -> None:
    reply, reason = REFUSED[name]
    assert parse(reply) == Rejected(reason)


@pytest.mark.parametrize("comment", ["", "// the answer\n"])
def test_an_object_in_lines_is_read_as_json_and_its_names_are_no_headings(comment: str) -> None:
    lines = json.dumps(FINE | {"better_response": "Paris."}, indent=1).replace('"better', f'{comment}"better')
    assert parse(lines) == Parsed(FINE, {"better_response": "Paris."})


def test_tags_of_html_in_one_line_stay_together() -> None:
    assert parse(delimited("<b>Paris</b><i>now</i>.")) == Parsed(FINE, {"better_response": "<b>Paris</b><i>now</i>."})


def test_a_failed_call_has_no_reply() -> None:
    assert parse(None) == Rejected("call_failed")


def test_a_reply_cut_off_by_the_limit_is_told_apart() -> None:
    assert parse(delimited("Paris.", end=""), "length") == Rejected("cut_off")
    assert parse(delimited("Paris.") + "\nI hope th", "length") == Parsed(FINE, {"better_response": "Paris."})


@pytest.mark.parametrize(
    "answer",
    [
        "The Endocrine system.\nEnd of story, [End] of line.",
        "Two points:\n\n1. Accuracy: it is exact.\n2. Speed: it is fast.",
        "Better answers come from better questions.",
        "```python\ndef f():\n    return '[End]'\n```",
        "    total = x + y\n    return total",
        "\treturn x",
        "Use `\\n` for a line end.\nThat is all.",
        "\\(\\nabla f = 0\\) and $\\nu$",
        "Dear Ann,\n\nthe response is late.\n\nNote: I will call you.",
        "First.\n\nSecond, with \"quotes\".\n\n- third\n- fourth",
        "[1, 2, 3]",
        "None",
        "巴黎是法国的首都。",
        "<html>\n<body>\n<p>Hi</p>\n</body>\n</html>",
        "Use this:\n\n<ul>\n<li>a</li>\n</ul>\n\nIt makes a list.",
        "<quiz>\n<answer>\n2\n</answer>\n</quiz>",
        "BEN\nHere.\n\n[End of scene]",
        "def hello\n  puts 1\nend",
        "SELECT CASE\n  WHEN a THEN 1\nEND",
        "B\n\nExplanation: The correct answer is B because water boils at 100 degrees.",
        "<p>Now $15, not <s>$20</s>",
    ],
)  # fmt: skip
def test_an_answer_comes_back_letter_for_letter(answer: str) -> None:
    assert parse(delimited(answer)) == Parsed(FINE, {"better_response": answer})


def test_both_sections_of_an_instruction_are_read_in_the_papers_form() -> None:
    critique = "\n".join(
        ["Complexity of the Topic: simple", "Level of Detail Required: low", "Knowledge Required: little",
         "Ambiguity of the Instruction: none", "Logical Reasoning or Problem-Solving Involved: little"]
    )  # fmt: skip
    reply = f"{critique}\n\n[New Instruction] Name a river. [End]\n\n[New Answer]\nRhine.\n\nIt is long. [End]"
    parsed = parse_reply(reply, "stop", "delimited", INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS)
    assert isinstance(parsed, Parsed)
    assert parsed.texts == {"better_instruction": "Name a river.", "better_response": "Rhine.\n\nIt is long."}
    assert list(parsed.critique.values()) == ["simple", "low", "little", "none", "little"]
