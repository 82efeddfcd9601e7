"""The web server shows the whole graph with what was made, in a real browser."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from cluster.dagster_home import open_instance
from cluster.local import child, free_port, wait_for
from flows.config import load_config
from flows.recycle_and_train import SPECS
from flows.run import open_run
from flows.ui import server_environment

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs/smoke.yaml"
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=2000,1100"
)
REFRESH, POLL_S, DRAWN_S = "base", 1.0, 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver"),
]


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Address of a web server on a history in which every asset was made once."""
    overrides = [f"storage={tmp_path / 'storage'}"]
    run = open_run(load_config(CONFIG, overrides), SPECS)
    with open_instance(Path(run.dagster_home)) as instance:
        instance.add_dynamic_partitions("refresh", [REFRESH])
        for name, spec in SPECS.items():
            partition = REFRESH if spec.partitions_def is not None else None
            instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=partition))
    port = free_port()
    module = ["-m", "flows.recycle_and_train", "-d", str(REPOSITORY)]
    command = ["dagster-webserver", "--host", "127.0.0.1", "--port", str(port), *module]
    log = tmp_path / "web.log"
    with child(command, log, cwd=REPOSITORY, environment=server_environment(run, CONFIG, overrides)) as server:
        wait_for(f"http://127.0.0.1:{port}", log, server)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        yield driver
        driver.quit()


def test_the_graph_shows_every_asset_and_that_it_was_made(web_server: str, browser: webdriver.Chrome) -> None:
    open_graph(browser, web_server)
    deadline = time.monotonic() + DRAWN_S
    while missing := [name for name in SPECS if name not in shown(browser)]:
        assert time.monotonic() < deadline, f"not drawn: {missing}"
        time.sleep(POLL_S)
    picture = os.environ.get("RECYCLE_SAVE_ASSET_GRAPH")
    if picture:
        browser.save_screenshot(picture)


def open_graph(browser: webdriver.Chrome, address: str) -> None:
    browser.get(f"{address}/robots.txt")  # any page of this origin: an invitation would lie over the graph
    browser.execute_script("localStorage.setItem('communityNux', '1')")
    browser.get(f"{address}/asset-groups")
    deadline = time.monotonic() + DRAWN_S
    while "Materialize all" not in shown(browser):
        assert time.monotonic() < deadline, "the page of the graph did not come up"
        time.sleep(POLL_S)
    ActionChains(browser).key_down(Keys.ALT).send_keys("e").key_up(Keys.ALT).perform()  # expand all groups


def shown(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.innerText"))
