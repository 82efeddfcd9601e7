import math

import pytest

from operators.report.charts import HEIGHT, WIDTH, Chart, Series, curve, histogram


def chart_of(*values: list[int], limit: float | None = None) -> Chart:
    names = ("before", "after")
    series = [Series(name, name, counts) for name, counts in zip(names, values, strict=False)]
    chart = histogram("Lengths", "words", [0, 1, 2, 4, 8, 16], series, limit=limit)
    assert chart is not None
    return chart


def test_nothing_counted_gives_no_chart() -> None:
    assert histogram("Lengths", "words", [0, 1], [Series("before", "before", [0, 0])]) is None
    assert histogram("Lengths", "words", [], [Series("before", "before", [])]) is None


def test_bars_keep_every_count_and_drop_empty_ends() -> None:
    chart = chart_of([0, 0, 500, 0, 300, 0], [0, 0, 0, 100, 0, 0])
    assert chart.table == [["2 to under 4", "500", "0"], ["4 to under 8", "0", "100"], ["8 to under 16", "300", "0"]]
    assert [bar["title"] for bar in chart.bars] == [
        "before, 2 to under 4: 500",
        "before, 8 to under 16: 300",
        "after, 4 to under 8: 100",
    ]


def test_few_values_are_drawn_in_wider_bins() -> None:
    assert chart_of([0, 0, 1, 2, 3, 4]).table == [["2 to under 8", "3"], ["8 or more", "7"]]


def test_bars_stay_inside_and_are_proportional() -> None:
    chart = chart_of([200, 100, 0, 0, 0, 400])
    for bar in chart.bars:
        assert chart.left <= bar["x"] < bar["x"] + bar["width"] <= chart.right
        assert bar["y"] + bar["height"] == pytest.approx(chart.bottom)
    heights = [bar["height"] for bar in chart.bars]
    assert heights[0] == pytest.approx(2 * heights[1])
    assert heights[2] == pytest.approx(4 * heights[1])


def test_the_limit_stands_on_its_edge_with_room_on_both_sides() -> None:
    chart = chart_of([0, 0, 0, 0, 200, 0], limit=4)
    assert [row[0] for row in chart.table] == ["2 to under 4", "4 to under 8", "8 to under 16"]
    assert chart.limit == pytest.approx(chart.left + (chart.right - chart.left) / 3)


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, 2.0], [None, None]])
def test_a_curve_needs_two_finite_values(values: list[float | None]) -> None:
    assert curve("Loss", "loss", values) is None


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0, 0.0], [-1.0, 5.0, math.inf, 3.0], [1e-9, 2e-9], [1e12, 1.0]])
def test_a_curve_stays_inside_its_chart(values: list[float]) -> None:
    chart = curve("Loss", "loss", values)
    assert chart is not None
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, _ in chart.lines[0]["points"])
    assert 2 <= len(chart.y_ticks) <= 8


def test_a_long_curve_is_drawn_as_means() -> None:
    chart = curve("Loss", "loss", [float(step % 2) for step in range(100_000)])
    assert chart is not None
    assert len(chart.table) <= 240
    assert {row[1] for row in chart.table[:-1]} <= {"0.4988", "0.5", "0.5012"}
