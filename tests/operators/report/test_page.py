"""The page in a real browser: nothing is loaded, nothing overflows, the filter works without a script."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from operators.report.report import Report
from tests.operators.report.report_samples import SECTIONS, partial_report

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


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
    driver.get_log("performance")  # drops what the browser's own start page loaded
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
