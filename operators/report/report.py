"""The report of a run: one self-contained HTML page for people, and the same figures as JSON for machines.

The page loads nothing and runs no script (its Content-Security-Policy forbids both), and escapes every text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from ray.data import Dataset

from operators.columns import ACTIVE
from operators.evaluate.release_history import Decision
from operators.evaluate.results import Evaluation, Release
from operators.redact import without_credentials
from operators.report.charts import Chart, Series, curve, histogram
from operators.report.collected import PackCounts, RowCounts
from operators.report.conclusion import conclude
from operators.report.costs import StageCost
from operators.report.figures import RATIO, ReportConfig, collect_figures
from operators.report.page import page_environment
from operators.report.pairs import cut_text
from operators.report.stages import StageSummary
from operators.report.styles import style_line, style_lines

__all__ = ["Report", "ReportConfig", "Results", "build_report", "collect_figures"]

Figures = dict[str, Any]  # what reports/<run>.json holds

TEMPLATE = "report.html.j2"
FIRST_STAGE = "raw_instructions"
TEACHER = ("calls", "cached_calls", "failed_calls", "prompt_tokens", "generated_tokens", "cost", "seconds")
TRAIN = (
    *("steps", "tokens", "supervised_tokens", "seconds", "tokens_per_second", "first_loss", "last_loss"),
    *("losses", "grad_norms", "neftune_alpha", "attention", "attention_implementation", "hyper_attention_layers"),
    *("zero_stage", "num_workers", "precision", "notes"),
)
JUDGE = "judge"  # a stage of the ledger whose calls are not reflections
SCORE_NAMES = {
    "ifd_original": "original instruction",
    "ifd_better_instruction": "rewritten instruction",
    "rifd_selected": "response kept so far",
    "rifd_better_response": "rewritten response",
}


@dataclass(frozen=True)
class Results:
    """The results of the stages, for the report.

    Attributes:
        stages: in the order of the graph.
        student: result of the training: steps, tokens, losses, ...; empty if there was none.
        evaluation: None if there was none.
        release: None if nothing was decided.
        decisions: the history of releases, the oldest first.
        costs: the calls in the ledger by stage, over all runs.
        unused_columns: column of the source that was not used -> number of rows in which it is not empty.
        general: records of `pack.mixture.general` by outcome, "" being those that can be used; empty without them.
        earlier: `figures` of the report that this one replaces.
    """

    stages: Sequence[StageSummary] = ()
    student: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    release: Release | None = None
    decisions: Sequence[Decision] = ()
    costs: Sequence[StageCost] = ()
    unused_columns: Mapping[str, int] = field(default_factory=dict)
    general: Mapping[str, int] = field(default_factory=dict)
    earlier: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Report:
    """`figures` goes to reports/<run>.json (no NaN in it), `html` to reports/<run>.html."""

    figures: Figures
    html: str


def build_report(
    run: str,
    recycled: Dataset | None,
    packs: Dataset | None,
    results: Results,
    config: dict[str, Any],
    report: ReportConfig,
) -> Report:
    """Collect a run's figures and render them; the page says which parts did not run.

    Columns in: `columns.RECYCLED`, `columns.PACKS`; None for a stage that did not run.

    Args:
        run: the run's name, as in reports/<run>.html.
        recycled: the recycled rows of all refreshes.
        packs: the packs made from them.
        results: of the stages.
        config: the whole run configuration.
        report: how much to show.

    Raises:
        ValueError: a data set lacks a column.
    """
    policy = (config.get("select") or {}).get("policy") or "ifd_rifd"
    collected = collect_figures(recycled, packs, report, policy)
    rows, student, evaluation = collected.rows, results.student, results.evaluation
    counted = collected.as_figures()
    general = collected.packing.rows - rows.packed if collected.packing else 0
    figures = {
        "run": run,
        **counted,
        "packing": counted["packing"] | (_efficiency(collected.packing, config) if collected.packing else {}),
        "teacher": _teacher(results, sum(rows.recycled.values())),
        "train": {name: student.get(name) for name in TRAIN} if student else {},
        "evaluation": evaluation.model_dump(mode="json") if evaluation else {},
        "release": results.release.model_dump(mode="json") if results.release else {},
        "releases": [decision.model_dump(mode="json") for decision in results.decisions],
        "stages": [stage.model_dump() for stage in results.stages],
        "unused_columns": dict(results.unused_columns),
        "general_data": _general(results.general),
        "conservation": _conservation(rows, results.stages, has_packs=packs is not None),
        "conclusion": conclude(evaluation, rows.recycled, student.get("steps"), rows.packed, general).model_dump(),
    }
    style = (config.get("reflect") or {}).get("style")
    change = evaluation.held_out_loss.change.estimate if evaluation else None
    lines = style_lines(results.earlier, style_line(style, figures, change)) if style else []
    figures = _json_ready({**figures, "styles": [line.model_dump() for line in lines]})
    return Report(figures, _render(figures, rows, config, report))


def _teacher(results: Results, num_recycled: int) -> Figures:
    """Sums over the stages (a `cached` call is one that the ledger held), and tokens and calls per recycled row."""
    sums = {name: sum(stage.teacher.get(name) or 0 for stage in results.stages) for name in TEACHER}
    reflections = [cost for cost in results.costs if cost.stage != JUDGE]
    in_all = {
        "paid_tokens": sum(cost.prompt_tokens + cost.generated_tokens for cost in reflections),
        "paid_cost": sum(cost.cost for cost in reflections),
    }
    each = {f"{name.removeprefix('paid_')}_per_recycled_row": value for name, value in in_all.items()}
    per_row = {name: value / num_recycled if num_recycled else None for name, value in each.items()}
    return sums | in_all | per_row | {"by_stage": [cost.model_dump() for cost in results.costs]}


def _general(outcomes: Mapping[str, int]) -> Figures:
    """The records of general data: how many there are and can be used, and the others by reason; empty without any."""
    others = {name.partition(":")[2]: number for name, number in outcomes.items() if name != ACTIVE}
    total = sum(outcomes.values())
    return {"records": total, "usable": outcomes.get(ACTIVE, 0), "left_out": others} if total else {}


def _efficiency(packing: PackCounts, config: dict[str, Any]) -> Figures:
    """The share of the packs' room that is filled; the room of a pack is `pack.max_tokens`, else the longest pack."""
    room = (config.get("pack") or {}).get("max_tokens") or packing.longest_pack
    return {"max_tokens": room, "efficiency": packing.tokens / (packing.packs * room) if packing.packs else None}


def _conservation(rows: RowCounts, stages: Sequence[StageSummary], *, has_packs: bool) -> Figures:
    """Every row that came in has exactly one outcome, and every recycled row is packed or has a reason why not."""
    came_in = next((stage.rows_out for stage in stages if stage.asset == FIRST_STAGE), None)
    came_in = rows.source if came_in is None else came_in
    recycled = sum(rows.recycled.values())
    out = recycled + sum(rows.quarantined.values()) + sum(rows.dropped.values())
    all_packed = not has_packs or recycled == rows.packed + sum(rows.unpacked.values())
    return {"in": came_in, "out": out, "holds": came_in == out and all_packed}


def _json_ready(value: Any) -> Any:
    """Plain JSON values; NaN and infinity become null, because JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(inner) for inner in value]
    if isinstance(value, np.generic):
        return _json_ready(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _render(figures: Figures, rows: RowCounts, config: dict[str, Any], report: ReportConfig) -> str:
    environment = page_environment()
    environment.globals["cut_text"] = lambda text: cut_text(text or "", report.max_chars)
    plain = without_credentials(json.loads(json.dumps(config, default=str)))
    return environment.get_template(TEMPLATE).render(
        **figures,
        score_names=SCORE_NAMES,
        funnel=_funnel(rows),
        charts=_charts(figures),
        samples=(figures["evaluation"].get("samples") or [])[: report.num_samples],
        configuration=yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100),
    )


def _funnel(rows: RowCounts) -> list[dict[str, Any]]:
    """The steps of the funnel with their bars; a segment has style class, label, count, start and width in %."""
    steps: list[dict[str, Any]] = []
    left = rows.source

    def add(
        name: str, reasons: Mapping[str, int], css: str, *, removes: bool, parts: Mapping[str, int] | None = None
    ) -> None:
        nonlocal left
        total = sum((parts or reasons).values())
        start = left - total if removes else 0
        segments = []
        for label, number in (parts or {name: total}).items():
            segments.append((label if parts else css, label, number, *_percent(start, number, rows.source)))
            start += number
        steps.append({"name": name, "count": total, "removes": removes, "segments": segments, "reasons": reasons})
        left -= total if removes else 0

    add("source", {}, "source", removes=False, parts={"source": rows.source})
    add("quarantined", rows.quarantined, "quarantined", removes=True)
    add("dropped", rows.dropped, "dropped", removes=True)
    if rows.active:
        add("active", {"no outcome": rows.active}, "dropped", removes=True)
    add("recycled", {}, "", removes=False, parts=rows.recycled)
    steps[-1]["parts"] = rows.recycled
    add("packed", rows.unpacked, "", removes=False, parts={"packed": rows.packed})
    return steps


def _percent(start: float, count: float, whole: float) -> tuple[float, float]:
    return (100 * start / whole, 100 * count / whole) if whole else (0.0, 0.0)


def _charts(figures: Figures) -> dict[str, Chart | None]:
    charts: dict[str, Chart | None] = {}
    for name, lengths in figures["lengths"].items():
        both = [Series("before", "before", lengths["before"]), Series("after", "after", lengths["after"])]
        charts[name] = histogram(f"Words per {name}, before and after", "words", lengths["edges"], both)
    scores = figures["scores"]
    for kind, old, new in (
        ("IFD", "ifd_original", "ifd_better_instruction"),
        ("r-IFD", "rifd_selected", "rifd_better_response"),
    ):
        is_ratio = scores[old]["measure"] == RATIO
        name = kind if is_ratio else str(scores[old]["measure"]).capitalize()
        both = [Series(SCORE_NAMES[one], css, scores[one]["counts"]) for one, css in ((old, "before"), (new, "after"))]
        title = f"{name} of the original and of the rewrite"
        charts[kind] = histogram(title, name, scores[old]["edges"], both, limit=1.0 if is_ratio else None)
    tokens = figures["packing"].get("document_tokens") or {"counts": [], "edges": []}
    series = [Series("examples", "after", tokens["counts"])]
    charts["tokens"] = histogram("Tokens per packed example", "tokens", tokens["edges"], series, y_label="examples")
    train = figures["train"]
    charts["loss"] = curve("Training loss", "loss, nats per token", train.get("losses") or [])
    changes = [
        decision["held_out_loss"]["change"]["estimate"]
        for decision in figures["releases"]
        if decision["event"] != "rolled_back"
    ]
    charts["releases"] = curve(
        "Held-out loss of each student less its base model's", "nats per token", changes, x_label="student"
    )
    charts["grad_norm"] = curve("Gradient norm before clipping", "norm", train.get("grad_norms") or [], css="before")
    return charts
