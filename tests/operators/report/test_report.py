"""The contents of the report of a complete or partial run; hostile text stays text in it."""

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest

from operators.evaluate.results import Evaluation, Harness, Release, TaskFailure, TaskScore
from operators.report.report import Report, ReportConfig, Results, build_report
from operators.report.stages import StageSummary
from tests.operators.report.report_samples import (
    COSTS,
    HOSTILE,
    OVERRIDE,
    SAMPLE,
    SECTIONS,
    packs_of,
    partial_report,
    recycled_of,
)


class Page(HTMLParser):
    """The tags of a page, and all its text outside the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += "" if self.tags and self.tags[-1][0] == "style" else data


def test_figures_have_the_keys_of_the_contract(sample: Report) -> None:
    figures = sample.figures
    assert figures["rows"]["source"] == 32
    assert figures["rows"]["recycled"] == {"original": 5, "instruction": 5, "response": 5, "both": 9}
    assert figures["rows"]["packed"] == 23
    assert figures["teacher"] == {
        "calls": 39,
        "cached_calls": 9,
        "failed_calls": 1,
        "prompt_tokens": 16131,
        "generated_tokens": 10581,
        "cost": pytest.approx(0.4),
        "seconds": pytest.approx(209.2),
        "paid_tokens": 36_000,
        "paid_cost": pytest.approx(0.6),
        "tokens_per_recycled_row": 1500,
        "cost_per_recycled_row": pytest.approx(0.025),
        "by_stage": [cost.model_dump() for cost in COSTS],
    }
    train = {"steps", "tokens", "tokens_per_second", "first_loss", "last_loss", "neftune_alpha", "attention"}
    assert train <= set(figures["train"])
    assert figures["evaluation"]["held_out_loss"]["student"] == 2.188
    assert figures["release"]["released"] is True
    assert figures["packing"]["efficiency"] == pytest.approx(2722 / (4 * 768))
    assert figures["conservation"] == {"in": 32, "out": 32, "holds": True}
    assert {"stages", "lengths", "scores", "reflections", "policies", "pairs", "conclusion"} <= set(figures)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("rows_out", [31, 33])
def test_a_row_that_is_lost_or_new_breaks_conservation(local_ray: None, rows_out: int) -> None:
    results = Results(stages=[StageSummary(asset="raw_instructions", rows_out=rows_out)])
    report = build_report("lossy", recycled_of(SAMPLE["rows"]), None, results, {}, ReportConfig())
    assert report.figures["conservation"] == {"in": rows_out, "out": 32, "holds": False}
    assert "rows do not add up" in report.html


def test_a_recycled_row_without_pack_and_reason_breaks_conservation(local_ray: None) -> None:
    packs = packs_of(SAMPLE["packs"][:-1])
    report = build_report("lossy", recycled_of(SAMPLE["rows"]), packs, Results(), {}, ReportConfig())
    assert report.figures["conservation"]["holds"] is False


def test_general_data_is_told_apart_from_recycled_rows(local_ray: None) -> None:
    packs = [
        *SAMPLE["packs"],
        {"row_ids": ["general-1"], "document_lengths": [9], "outcome": "packed"},
        {"row_ids": ["general-2"], "document_lengths": [], "outcome": "quarantined:too_long"},
    ]
    results = Results(general={"": 30, "dropped:contaminated": 4})
    report = build_report("mixed", recycled_of(SAMPLE["rows"]), packs_of(packs), results, {}, ReportConfig())
    assert report.figures["conservation"]["holds"] is True
    assert report.figures["rows"]["packed"] == 23
    assert report.figures["packing"]["general_rows"] == 1
    assert report.figures["general_data"] == {"records": 34, "usable": 30, "left_out": {"contaminated": 4}}
    text = " ".join(Page(report.html).text.split())
    assert "General data: 30 of 34 records can be used, and 1 of them are packed. Left out: contaminated 4." in text
    assert "Not packed: too long 1." in text


def test_numbers_that_are_not_finite_become_null(local_ray: None) -> None:
    student = {"steps": 2, "losses": [math.nan, math.inf], "grad_norms": [1.0], "first_loss": math.nan}
    figures = partial_report(student=student).figures
    json.dumps(figures, allow_nan=False)
    assert figures["train"]["losses"] == [None, None]
    assert figures["train"]["first_loss"] is None


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "The student was not trained in this run."),
        ({}, "The student was not evaluated in this run."),
        ({}, "No release was decided in this run."),
        ({}, "There is no recycled row to show."),
        ({}, "No stage reported its time."),
        ({"evaluation": Evaluation()}, "The judge did not run."),
        ({}, "The ledger has no calls."),
        ({}, "The student was not evaluated, so this run shows no gain."),
        ({"student": {"steps": 1, "losses": [2.0]}}, "Fewer than two losses were recorded."),
        (
            {
                "stages": [StageSummary(asset="student")],
                "release": Release(released=False, version="v", reasons=("worse",)),
            },
            "worse",
        ),
    ],
)
def test_a_partial_run_says_what_is_missing(parts: dict[str, Any], said: str) -> None:
    report = partial_report(**parts)
    assert said in Page(report.html).text
    assert all(f'id="{section}"' in report.html for section in SECTIONS)


def test_the_report_states_its_caveats(sample: Report) -> None:
    text = " ".join(Page(sample.html).text.split())
    assert (
        "On 4 held-out rows the loss went from 2.314 to 2.188 nats per token; fewer than 10 rows are too few to show"
        in text
    )
    assert "The source has columns that are not used: context (7 rows)" in text
    assert "HyperAttention in 4 layers, exact attention by varlen" in text
    assert "1 × 429 slow down" in text
    assert "released v006" in text
    assert "concise" in text
    assert sample.figures["styles"][1]["recycled"] == 24, "this run's own line, not the earlier one's"
    assert 'aria-label="History of releases"' in sample.html


def test_scores_on_tasks_stand_side_by_side_and_failures_are_told() -> None:
    score = TaskScore(task="arc_easy", metric="acc", scores={"base": 0.25, "student": 0.5}, errors={"base": 0.01})
    failure = TaskFailure(role="student", task="own", reason=HOSTILE)
    harness = Harness(version="0.4.13", scores=(score,), failed=(failure,))
    page = Page(partial_report(evaluation=Evaluation(harness=harness)).html)
    text = " ".join(page.text.split())
    assert "arc_easy acc" in text.replace("arc_easyacc", "arc_easy acc")
    assert "0.250 ± 0.010" in text
    assert "+0.250" in text
    assert "Task own failed for student: <script>alert(1)</script>" in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "Tasks" not in Page(partial_report(evaluation=Evaluation()).html).text


def test_hostile_text_stays_text(hostile: Report) -> None:
    page = Page(hostile.html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text
    assert "&amp; " in page.text
    assert OVERRIDE not in hostile.html
    assert "\x00" not in hostile.html
    assert "[U+202E]" in page.text


def test_a_long_text_is_cut_with_a_note(hostile: Report) -> None:
    assert f"cut here: 3,000 of {100_000 + len(HOSTILE):,} characters are shown" in hostile.html
    assert len(hostile.html) < 600_000


def test_the_page_loads_nothing(sample: Report) -> None:
    page = Page(sample.html)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert "url(" not in sample.html
    assert "@import" not in sample.html


def test_credentials_in_addresses_are_not_shown() -> None:
    html = partial_report(config={"storage": "s3://key:secret@bucket/x"}).html
    assert "bucket/x" in html
    assert "secret" not in html
