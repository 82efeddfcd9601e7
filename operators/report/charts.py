"""Computes the positions of a chart's marks; the template draws them as inline SVG in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 40
FEW_VALUES = 150  # with fewer values, two bins are drawn as one: narrow bars of one or two rows are hard to read
MAX_POINTS = 240  # of a curve; a longer one is drawn as means over equal numbers of steps
MAX_X_LABELS = 9
CURVE_RIGHT = 48  # room for the last value, written after the end of the line


@dataclass(frozen=True)
class Series:
    """One named series; `css` is its class in the style sheet ("before", "after")."""

    name: str
    css: str
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws, in the units of the SVG's view box."""

    title: str
    x_label: str
    y_label: str
    legend: list[tuple[str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    header: list[str]
    table: list[list[str]]
    bars: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    limit: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def histogram(
    title: str,
    x_label: str,
    edges: Sequence[float],
    series: list[Series],
    *,
    y_label: str = "rows",
    limit: float | None = None,
) -> Chart | None:
    """Bars side by side in each bin; the last bin is open. None if nothing was counted.

    Args:
        edges: lower edges; bins are drawn equally wide.
        series: counts by bin.
        limit: an edge to mark by a line; the area beyond it is shaded.
    """
    total = max((sum(one.values) for one in series), default=0)
    if not total:
        return None
    if total < FEW_VALUES:
        edges, series = edges[::2], [Series(one.name, one.css, _in_twos(one.values)) for one in series]
    names = [_bin_name(edges, at) for at in range(len(edges))]
    first, last = _used_bins(edges, series, limit)
    edges, names = edges[first:last], names[first:last]
    series = [Series(one.name, one.css, one.values[first:last]) for one in series]
    ceiling, y_ticks = _counting_axis(max(max(one.values) for one in series))
    slot = (WIDTH - LEFT - RIGHT) / len(edges)
    every = math.ceil(len(edges) / MAX_X_LABELS)
    return Chart(
        title,
        x_label,
        y_label,
        [(one.css, one.name) for one in series],
        [(LEFT + slot * at, _plain(edge)) for at, edge in enumerate(edges) if at % every == 0],
        [(_y(tick, 0, ceiling), f"{tick:,}") for tick in y_ticks],
        [x_label, *(one.name for one in series)],
        [[name, *(f"{one.values[at]:,}" for one in series)] for at, name in enumerate(names)],
        bars=_bars(series, names, slot, ceiling),
        limit=None if limit is None else LEFT + slot * list(edges).index(limit),
    )


def curve(
    title: str, y_label: str, values: Sequence[float | None], css: str = "after", x_label: str = "step"
) -> Chart | None:
    """A line over the steps, counted from 1; None if there are fewer than two finite values."""
    finite = [(step, value) for step, value in enumerate(values, 1) if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return None
    points = _thinned(finite)
    low, high, y_ticks = _measuring_axis([value for _, value in points])
    last_step = max(points[-1][0], 2)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - CURVE_RIGHT) * (step - 1) / (last_step - 1)

    placed = [(x(step), _y(value, low, high), f"{x_label} {step:.0f}: {value:.4g}") for step, value in points]
    line = {
        "css": css,
        "path": "M" + " L".join(f"{px:.1f},{py:.1f}" for px, py, _ in placed),
        "points": placed if len(placed) <= 60 else [],
        "end": (placed[-1][0], placed[-1][1], f"{points[-1][1]:.3g}"),
    }
    return Chart(
        title,
        x_label,
        y_label,
        [],
        [(x(step), str(step)) for step in _step_ticks(last_step)],
        [(_y(tick, low, high), f"{tick:.4g}") for tick in y_ticks],
        [x_label, y_label],
        [[f"{step:.0f}", f"{value:.4g}"] for step, value in points],
        lines=[line],
        right=WIDTH - CURVE_RIGHT,
    )


def _bars(series: list[Series], names: list[str], slot: float, ceiling: float) -> list[dict[str, Any]]:
    gap = slot * 0.12
    width = (slot - 2 * gap) / len(series)
    return [
        {
            "css": one.css,
            "x": LEFT + slot * at + gap + width * place,
            "y": _y(value, 0, ceiling),
            "width": width,
            "height": HEIGHT - BOTTOM - _y(value, 0, ceiling),
            "title": f"{one.name}, {names[at]}: {value:,}",
        }
        for place, one in enumerate(series)
        for at, value in enumerate(one.values)
        if value
    ]


def _in_twos(values: Sequence[float]) -> list[float]:
    return [sum(values[at : at + 2]) for at in range(0, len(values), 2)]


def _used_bins(edges: Sequence[float], series: list[Series], limit: float | None) -> tuple[int, int]:
    """The first bin in use and one past the last; there is at least one bin on each side of the limit."""
    used = [at for at in range(len(edges)) if any(one.values[at] for one in series)]
    if limit is not None:
        at = list(edges).index(limit)
        used += [at - 1, at]
    return min(used), max(used) + 1


def _bin_name(edges: Sequence[float], at: int) -> str:
    if at + 1 == len(edges):
        return f"{_plain(edges[at])} or more"
    return f"{_plain(edges[at])} to under {_plain(edges[at + 1])}"


def _plain(value: float) -> str:
    return f"{value:g}" if value < 10000 else f"{value:,.0f}"


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def _counting_axis(highest: float) -> tuple[float, list[int]]:
    step = max(1, int(_nice(highest / 4)))
    ceiling = math.ceil(highest / step) * step
    return ceiling, list(range(0, ceiling + 1, step))


def _measuring_axis(values: list[float]) -> tuple[float, float, list[float]]:
    """Lowest and highest value of the axis, and its ticks; zero is on the axis only if it is near the values."""
    low, high = min(values), max(values)
    if 0 <= low < 0.4 * high:
        low = 0.0
    step = _nice((high - low) / 4 or abs(high) or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = last if last > first else first + 1
    return first * step, last * step, [tick * step for tick in range(first, last + 1)]


def _nice(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def _step_ticks(last_step: float) -> list[int]:
    step = max(1, int(_nice(last_step / 6)))
    return sorted({1, *range(step, int(last_step) + 1, step)})


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    stride = math.ceil(len(points) / MAX_POINTS)
    stretches = (points[at : at + stride] for at in range(0, len(points), stride))
    return [(sum(step for step, _ in one) / len(one), sum(value for _, value in one) / len(one)) for one in stretches]
