"""Compares reflection styles, if runs of the same name used more than one."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from operators.columns import ORIGINAL


class StyleLine(BaseModel):
    """The numbers of one style (`reflect.style`) from the latest run that used it.

    Attributes:
        style: of the configuration.
        recycled: rows that were recycled.
        rewritten: those of them whose instruction or response was replaced.
        instruction_words: median length of the final instructions, words.
        response_words: median length of the final responses, words.
        tokens_per_row: tokens that the teacher read and wrote for each recycled row, all runs of the storage together.
        loss_change: held-out loss of the student less the base model's, nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: str
    recycled: int
    rewritten: int
    instruction_words: float | None
    response_words: float | None
    tokens_per_row: float | None
    loss_change: float | None


def style_lines(earlier: Mapping[str, Any] | None, line: StyleLine) -> list[StyleLine]:
    """The earlier report's lines about other styles, and this run's line, sorted by style."""
    lines = {line.style: line}
    for record in (earlier or {}).get("styles") or []:
        try:
            known = StyleLine.model_validate(record)
        except ValidationError:  # a report of another version of this program
            continue
        lines.setdefault(known.style, known)
    return [lines[style] for style in sorted(lines)]


def style_line(style: str, figures: Mapping[str, Any], loss_change: float | None) -> StyleLine:
    """This run's line about its style.

    Args:
        style: `reflect.style`.
        figures: of the report, with rows, lengths and teacher.
        loss_change: from the evaluation.
    """
    recycled = sum(figures["rows"]["recycled"].values())
    return StyleLine(
        style=style,
        recycled=recycled,
        rewritten=recycled - figures["rows"]["recycled"][ORIGINAL],
        instruction_words=figures["lengths"]["instruction"]["median_after"],
        response_words=figures["lengths"]["response"]["median_after"],
        tokens_per_row=figures["teacher"]["tokens_per_recycled_row"],
        loss_change=loss_change,
    )
