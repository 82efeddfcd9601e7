"""The reflection styles side by side, where runs of one name used more than one."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from operators.columns import ORIGINAL


class StyleLine(BaseModel):
    """What one style (`reflect.style`) came to in the latest run that used it.

    Attributes:
        style: of the configuration.
        recycled: rows that were recycled.
        rewritten: of them, rows whose instruction or response was replaced.
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
    """The lines of the run's earlier report that are about other styles, and this run's, sorted by style."""
    lines = {line.style: line}
    for record in (earlier or {}).get("styles") or []:
        try:
            known = StyleLine.model_validate(record)
        except ValidationError:  # a report of another version of this program
            continue
        lines.setdefault(known.style, known)
    return [lines[style] for style in sorted(lines)]


def style_line(style: str, figures: Mapping[str, Any], loss_change: float | None) -> StyleLine:
    """What this run says of its style.

    Args:
        style: `reflect.style`.
        figures: the report's: rows, lengths, teacher.
        loss_change: of the evaluation.
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
