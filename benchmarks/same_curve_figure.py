"""The figure of `same_curve.py`: the losses of all runs, and how far they are from the run that was never stopped."""

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, MARGIN, UPPER, LOWER = 760, 64, 300, 190  # UPPER and LOWER are the heights of the two panels
FLOOR, CEILING = 1e-9, 1e-3  # relative differences that the lower panel shows; smaller ones are drawn at the floor
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d35400", "#16a085", "#7f6000", "#444444")


class Run(NamedTuple):
    """One run: its name, the loss of each step, the relative difference of each, and the steps before which it ended.

    After each of `ends` another number of workers went on.
    """

    name: str
    losses: Sequence[float]
    differences: Sequence[float]
    ends: Sequence[int]


def figure(whole: Sequence[float], runs: Sequence[Run], limit: float, how: str) -> str:
    """The two panels as SVG.

    Args:
        whole: losses of the run that was never stopped.
        runs: to compare with it.
        limit: the largest relative difference that is allowed; a dashed line.
        how: "killed" or "stopped".
    """
    height = UPPER + LOWER + 2 * MARGIN + 18 * (len(runs) + 1)
    when = "soon after" if how == "killed" else "at"
    low, high = min(whole), max(whole)
    low, high = low - (high - low) / 10, high + (high - low) / 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><g font-size="12" fill="#222">',
        _text(MARGIN, 24, f"loss, nats per token; grey: one worker that was never {how}; coloured: runs that were"),
    ]

    def x(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step + 0.5) / len(whole)

    def upper(loss: float) -> float:
        return 40 + (UPPER - 40) * (1 - (loss - low) / (high - low))

    def lower(difference: float) -> float:
        share = math.log(min(max(difference, FLOOR), CEILING) / FLOOR) / math.log(CEILING / FLOOR)
        return UPPER + MARGIN + LOWER * (1 - share)

    parts += [_rule(upper(low + (high - low) * part), f"{low + (high - low) * part:.2f}") for part in (0, 0.5, 1)]
    every = max(1, len(whole) // 10)
    bottom = UPPER + MARGIN + LOWER
    parts += [_text(x(step), bottom + 18, str(step), "middle") for step in range(0, len(whole), every)]
    parts.append(
        _text(
            MARGIN,
            UPPER + MARGIN - 12,
            "relative difference from the grey curve, by step; dashed: the limit; at the lowest line: 1e-9 or less",
        )
    )
    parts += [_rule(lower(10.0**power), f"1e{power}") for power in range(-9, -2, 2)]
    parts.append(_rule(lower(limit), "", ' stroke-dasharray="6 4"', "#c0392b"))
    parts.append(_line([(x(step), upper(loss)) for step, loss in enumerate(whole)], "#bbb", 7))
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for end in run.ends:
            place = x(end - 0.5) + 3 * (number - len(runs) / 2)
            parts.append(
                f'<line x1="{place:.1f}" x2="{place:.1f}" y1="40" y2="{bottom}" stroke="{colour}" '
                'stroke-width="1" stroke-dasharray="2 3"/>'
            )
        parts.append(_line([(x(step), upper(loss)) for step, loss in enumerate(run.losses)], colour, 1.2))
        for step, (loss, difference) in enumerate(zip(run.losses, run.differences, strict=True)):
            parts.append(_point(x(step), upper(loss), colour))
            parts.append(_point(x(step), lower(difference), colour))
        parts.append(_point(MARGIN, bottom + 42 + 18 * number, colour, 5))
        parts.append(_text(MARGIN + 14, bottom + 46 + 18 * number, f"{run.name}, {how} {when} the dotted lines"))
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _rule(y: float, label: str, style: str = "", colour: str = "#ddd") -> str:
    line = f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"{style}/>'
    return line + _text(MARGIN - 8, y + 4, label, "end")


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _point(x: float, y: float, colour: str, size: float = 2.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>'
