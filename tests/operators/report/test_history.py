"""The page about refreshes and releases: hostile text is inert, one value gives no line, losses and sums are right."""

from operators.evaluate.release_history import Decision
from operators.evaluate.results import HeldOutLoss
from operators.report.history import RefreshLine, build_history, history_charts

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def decision(number: int, student: float | None, event: str = "released") -> Decision:
    loss = HeldOutLoss(base=2.0, student=student)
    return Decision(
        number=number,
        event=event,
        version=f"v{number}",
        previous=None,
        at="2026",
        reasons=(HOSTILE,),
        held_out_loss=loss,
    )


def test_losses_differences_and_running_sums_are_drawn() -> None:
    refreshes = [RefreshLine(key=str(n), new=n, recycled=n, calls=n, tokens=9 * n) for n in (1, 2, 3)]
    decisions = [decision(1, 1.5), decision(2, None), decision(3, 1.25), decision(4, 1.5, "rolled_back")]
    drawn = {chart.title: [row[1] for row in chart.table] for chart in history_charts(refreshes, decisions)}
    assert drawn["Held-out loss of the student"] == ["1.5", "1.25"]
    assert drawn["Held-out loss less the base model's"] == ["-0.5", "-0.75"]
    assert drawn["Recycled rows of all refreshes"] == ["1", "3", "6"]
    assert "Cost" not in drawn, "no prices are configured"


def test_hostile_text_is_inert_and_an_empty_storage_has_a_page() -> None:
    page = build_history(HOSTILE, [RefreshLine(key=HOSTILE)], [decision(1, 1.5)], None)
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert "A line needs two refreshes or two decisions." in build_history("s", [], [], None)
