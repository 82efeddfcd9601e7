"""The browse program as a person starts it: in a real browser, and on this machine only."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.flows.browsed_storage import SAMPLE, sample_storage

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return sample_storage(tmp_path)


@pytest.fixture
def program(storage: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of the real program."""
    code = "import sys; from flows.browse import browse; sys.exit(browse(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(storage), "--port", "0"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip(), process.pid
    process.terminate()
    process.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver")
def test_a_person_filters_searches_and_opens_a_row(program: tuple[str, int], tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import url_to_be
    from selenium.webdriver.support.select import Select
    from selenium.webdriver.support.wait import WebDriverWait

    def wait_for_rows(number: int) -> None:  # a click returns before the next page has loaded
        WebDriverWait(browser, 30).until(lambda one: len(one.find_elements(By.TAG_NAME, "article")) == number)

    served, _ = program
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1240,1600"]:
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            browser.get(served)
            browser.find_element(By.LINK_TEXT, "recycled instructions").click()
            wait_for_rows(20)
            browser.save_screenshot(str(tmp_path / "rows.png"))
            Select(browser.find_element(By.NAME, "outcome")).select_by_value("both")
            browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
            wanted = [row for row in SAMPLE if row["outcome"] == "both"]
            wait_for_rows(len(wanted))
            browser.find_element(By.NAME, "text").send_keys(wanted[1]["final_instruction"][:40])
            browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
            wait_for_rows(1)
            browser.find_element(By.LINK_TEXT, wanted[1]["row_id"]).click()
            WebDriverWait(browser, 30).until(url_to_be(f"{served}/row/{wanted[1]['row_id']}"))
            browser.get(f"{served}/row/{SAMPLE[0]['row_id']}")
            assert browser.find_elements(By.TAG_NAME, "script") == []
            assert "<script>alert(1)</script>" in browser.find_element(By.TAG_NAME, "main").text
            browser.save_screenshot(str(tmp_path / "row.png"))
            browser.set_window_size(390, 1200)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 500
            assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
        finally:
            browser.quit()


@pytest.mark.slow
def test_the_program_listens_on_loopback_only(program: tuple[str, int]) -> None:
    address, pid = program
    sockets = psutil.Process(pid).net_connections()
    listening = {(one.laddr.ip, one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", int(address.rpartition(":")[2]))}
