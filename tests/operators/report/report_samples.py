"""A run of 32 rows, its costs and its releases, for the tests of the report and of its page."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from operators import columns
from operators.evaluate.release_history import Decision
from operators.evaluate.results import Evaluation, HeldOutLoss, PairedChange, Release
from operators.report.costs import StageCost
from operators.report.report import Report, ReportConfig, Results, build_report
from operators.report.stages import StageSummary

SAMPLE = json.loads((Path(__file__).resolve().parents[2] / "data" / "report_sample.json").read_text())
SECTIONS = [
    *("funnel", "pairs", "lengths", "scores", "training", "evaluation", "release", "costs", "stages"),
    "configuration",
]
COSTS = [
    StageCost(stage="judge", calls=16, prompt_tokens=900, generated_tokens=100, cost=0.01),
    StageCost(
        stage="reflect_instructions",
        calls=24,
        failed=1,
        prompt_tokens=20_000,
        generated_tokens=9_000,
        cost=0.4,
        failures={"429 slow down": 1},
    ),
    StageCost(stage="reflect_responses", calls=15, prompt_tokens=5_000, generated_tokens=2_000, cost=0.2),
]
LOSSES = HeldOutLoss(base=2.314, student=2.188, num_rows=4, change=PairedChange(num_rows=4, estimate=-0.126))
DECISIONS = [
    Decision(
        number=number, event="released", version=f"v{number}", previous=None, at="now", reasons=(), held_out_loss=LOSSES
    )
    for number in (1, 2)
]
OVERRIDE = "\u202e"
HOSTILE = f"<script>alert(1)</script></style></p>{{{{ 7*7 }}}}<img src=x onerror=alert(2)>{OVERRIDE}gnp.exe\x00 &amp; "


STYLE = {
    "recycled": 24,
    "rewritten": 12,
    "instruction_words": 9.0,
    "response_words": 30.0,
    "tokens_per_row": 1000.0,
    "loss_change": -0.1,
}


def recycled_of(rows: list[dict[str, Any]]) -> Any:
    return ray.data.from_arrow(pa.Table.from_pylist(rows, schema=columns.RECYCLED))


def packs_of(packs: list[dict[str, Any]]) -> Any:
    def filled(pack: dict[str, Any]) -> dict[str, Any]:
        tokens = [0] * sum(pack["document_lengths"])
        return {"input_ids": tokens, "labels": tokens, "position_ids": tokens, **pack}

    return ray.data.from_arrow(pa.Table.from_pylist([filled(pack) for pack in packs], schema=columns.PACKS))


def partial_report(**parts: Any) -> Report:
    config = parts.pop("config", {})
    return build_report("nightly", None, None, Results(**parts), config, ReportConfig())


def results_of(run: dict[str, Any], **parts: Any) -> Results:
    evaluation, release = Evaluation.model_validate(run["evaluation"]), Release.model_validate(run["release"])
    stages = [StageSummary.model_validate(stage) for stage in run["stages"]]
    named = {"stages": stages, "student": run["student"], "evaluation": evaluation, "release": release}
    return Results(**(named | {"costs": COSTS, "decisions": DECISIONS} | parts))
