"""One page over all refreshes and releases of a storage: loss, win rate, rows and cost, as lines and as numbers."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from operators.evaluate.release_history import Decision, Pointer
from operators.report.charts import Chart, curve
from operators.report.page import page_environment

TEMPLATE = "history.html.j2"


class RefreshLine(BaseModel):
    """The numbers of one refresh, from the last run that made it.

    Attributes:
        key: of the refresh.
        read: rows of its source files.
        new: those of them that no earlier refresh had and that were not quarantined or copies.
        recycled: rows that students are trained on.
        held_out: rows that students are measured on.
        calls: teacher calls of that run; stored replies that it used again do not count.
        tokens: tokens that these calls read and wrote.
        cost: of these calls, at the prices of that run's configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    read: int = 0
    new: int = 0
    recycled: int = 0
    held_out: int = 0
    calls: int = 0
    tokens: int = 0
    cost: float = 0.0


def build_history(
    storage: str, refreshes: Sequence[RefreshLine], decisions: Sequence[Decision], current: Pointer | None
) -> str:
    """The page as HTML without scripts; `refreshes` and `decisions` are in the order in which they were made."""
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            storage=storage,
            refreshes=refreshes,
            decisions=decisions,
            released=current.version if current else "",
            charts=history_charts(refreshes, decisions),
        )
    )


def history_charts(refreshes: Sequence[RefreshLine], decisions: Sequence[Decision]) -> list[Chart]:
    """The charts that have at least two values."""
    judged = [decision for decision in decisions if decision.event != "rolled_back"]
    wins = [decision.judge.win_margin if decision.judge else None for decision in judged]
    changes = [_change(decision) for decision in judged]
    over_refreshes = {
        ("New rows", "rows"): [float(one.new) for one in refreshes],
        ("Recycled rows of all refreshes", "rows"): _running([one.recycled for one in refreshes]),
        ("Teacher calls", "calls"): [float(one.calls) for one in refreshes],
        ("Tokens of the teacher", "tokens"): [float(one.tokens) for one in refreshes],
        ("Cost", "cost"): [one.cost for one in refreshes] if any(one.cost for one in refreshes) else [],
    }
    found = [
        curve("Held-out loss of the student", "nats", [one.held_out_loss.student for one in judged], x_label="release"),
        curve("Held-out loss less the base model's", "nats", changes, x_label="release"),
        curve("Win margin against the base model", "margin", wins, x_label="release"),
        *(curve(title, unit, values, x_label="refresh") for (title, unit), values in over_refreshes.items()),
    ]
    return [chart for chart in found if chart is not None]


def _change(decision: Decision) -> float | None:
    loss = decision.held_out_loss
    return None if loss.student is None or loss.base is None else loss.student - loss.base


def _running(values: Sequence[int]) -> list[float]:
    total, sums = 0, []
    for value in values:
        total += value
        sums.append(float(total))
    return sums
