from operators.report.styles import StyleLine, style_line, style_lines

FIGURES = {
    "rows": {"recycled": {"original": 4, "instruction": 1, "response": 2, "both": 3}},
    "lengths": {"instruction": {"median_after": 12.0}, "response": {"median_after": 40.0}},
    "teacher": {"tokens_per_recycled_row": 900.0},
}


def test_a_line_is_made_of_the_runs_own_figures() -> None:
    line = style_line("papers", FIGURES, -0.1)
    assert line == StyleLine(
        style="papers",
        recycled=10,
        rewritten=6,
        instruction_words=12.0,
        response_words=40.0,
        tokens_per_row=900.0,
        loss_change=-0.1,
    )


def test_lines_of_other_styles_are_kept_and_the_runs_own_is_new() -> None:
    old = style_line("papers", FIGURES, None)
    other = style_line("concise", FIGURES, 0.2)
    earlier = {"styles": [old.model_dump(), other.model_dump(), {"style": "unknown form"}, "nonsense"]}
    new = style_line("papers", FIGURES, -0.3)
    assert style_lines(earlier, new) == [other, new]
    assert style_lines(None, new) == style_lines({}, new) == [new]
