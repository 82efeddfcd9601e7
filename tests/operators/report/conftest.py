"""The report of the sample run, and a report in which every text is an attack."""

import json

import pytest

from operators import columns
from operators.evaluate.results import Evaluation, HeldOutLoss, Judgement, Release, Sample
from operators.report.costs import StageCost
from operators.report.report import Report, ReportConfig, Results, build_report
from operators.report.stages import StageSummary
from tests.operators.report.report_samples import DECISIONS, HOSTILE, SAMPLE, STYLE, packs_of, recycled_of, results_of


@pytest.fixture(scope="session")
def sample(local_ray: None) -> Report:
    recycled, packs = recycled_of(SAMPLE["rows"]), packs_of(SAMPLE["packs"])
    run = SAMPLE["run"]
    earlier = {"styles": [{**STYLE, "style": "concise"}, {**STYLE, "style": "papers", "recycled": 1}, {"style": 3}]}
    student = run["student"] | {"attention_implementation": "varlen", "hyper_attention_layers": 4, "notes": ["a note"]}
    results = results_of(run, student=student, unused_columns={"context": 7}, earlier=earlier)
    config = run["config"] | {"reflect": {"style": "papers"}}
    return build_report("2026-11-22", recycled, packs, results, config, ReportConfig())


@pytest.fixture(scope="session")
def hostile(local_ray: None) -> Report:
    """Every text of the sample is an attack; one is 100 kB."""
    texts = [name for name in columns.RECYCLED.names if name not in ("row_id", "outcome", "escaped")]
    rows = [
        {name: HOSTILE + value if name in texts and isinstance(value, str) else value for name, value in row.items()}
        for row in SAMPLE["rows"]
    ]
    for row in rows:
        row["instruction_critique"] = json.dumps({HOSTILE: HOSTILE})
        row["response"] = HOSTILE + "x" * 100_000
        row["outcome"] = row["outcome"] + HOSTILE if ":" in row["outcome"] else row["outcome"]
    names = ("row_id", "instruction", "input", "reference", "base", "student", "verdict")
    sample = Sample(**dict.fromkeys(names, HOSTILE), base_tokens=1, student_tokens=1)  # type: ignore[arg-type]
    loss = HeldOutLoss(unscored={HOSTILE: 1})
    results = Results(
        evaluation=Evaluation(samples=(sample,), judge=Judgement(unparsed_reasons={HOSTILE: 1}), held_out_loss=loss),
        release=Release(released=False, version=HOSTILE, previous=HOSTILE, reasons=(HOSTILE,)),
        stages=[StageSummary(asset=HOSTILE, rows_out=32)],
        costs=[StageCost(stage=HOSTILE, calls=1, failed=1, failures={HOSTILE: 1})],
        unused_columns={HOSTILE: 1},
        student={"steps": 1, "attention_implementation": HOSTILE, "notes": [HOSTILE]},
        decisions=[decision.model_copy(update={"version": HOSTILE, "at": HOSTILE}) for decision in DECISIONS],
    )
    packs = packs_of(SAMPLE["packs"])
    return build_report(HOSTILE, recycled_of(rows), packs, results, {HOSTILE: HOSTILE}, ReportConfig())
