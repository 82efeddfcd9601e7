import base64
import json
import math
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators import columns
from operators.evaluate.release_history import Decision
from operators.evaluate.results import Evaluation, HeldOutLoss, Judgement, PairedChange, Release, Sample
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
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


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


@pytest.fixture(scope="module")
def sample(local_ray: None) -> Report:
    recycled, packs = recycled_of(SAMPLE["rows"]), packs_of(SAMPLE["packs"])
    run = SAMPLE["run"]
    earlier = {"styles": [{**STYLE, "style": "concise"}, {**STYLE, "style": "papers", "recycled": 1}, {"style": 3}]}
    student = run["student"] | {"attention_implementation": "varlen", "hyper_attention_layers": 4, "notes": ["a note"]}
    results = results_of(run, student=student, unused_columns={"context": 7}, earlier=earlier)
    config = run["config"] | {"reflect": {"style": "papers"}}
    return build_report("2026-11-22", recycled, packs, results, config, ReportConfig())


@pytest.fixture(scope="module")
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


def test_what_is_not_finite_becomes_null(local_ray: None) -> None:
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
        ({}, "The ledger holds no call."),
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


def test_what_the_reader_must_know_is_said(sample: Report) -> None:
    text = " ".join(Page(sample.html).text.split())
    assert (
        "On 4 held-out rows the loss went from 2.314 to 2.188 nats per token; fewer than 10 rows are too few to say"
        in text
    )
    assert "The source has columns that nothing here reads: context (7 rows)" in text
    assert "HyperAttention in 4 layers, exact attention by varlen" in text
    assert "1 × 429 slow down" in text
    assert "released v006" in text
    assert "concise" in text
    assert sample.figures["styles"][1]["recycled"] == 24, "this run's own line, not the earlier one's"
    assert 'aria-label="History of releases"' in sample.html


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


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    for program in (CHROMIUM, CHROMEDRIVER):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    driver.get("about:blank")
    driver.get_log("performance")  # forgets what the browser's own start page loaded
    yield driver
    driver.quit()


def requested(browser: Any) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {params["request"]["url"] for params in sent}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sample", "hostile", "partial"])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    report = partial_report() if kind == "partial" else request.getfixturevalue(kind)
    file = tmp_path / f"{kind}.html"
    file.write_text(report.html, encoding="utf-8")
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(file.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert requested(browser) == {file.as_uri()}
        for section in SECTIONS:
            assert browser.find_element("id", section).is_displayed(), section
        assert browser.find_elements("css selector", "script, img") == []
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (tmp_path / f"{kind}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_filter_shows_one_outcome(browser: Any, tmp_path: Path, sample: Report) -> None:
    file = tmp_path / "sample.html"
    file.write_text(sample.html, encoding="utf-8")
    browser.get(file.as_uri())
    browser.execute_script("document.getElementById('show-response').click()")
    shown = [pair for pair in browser.find_elements("css selector", ".pair") if pair.is_displayed()]
    assert len(shown) == 3
    assert all("is-response" in pair.get_attribute("class") for pair in shown)
