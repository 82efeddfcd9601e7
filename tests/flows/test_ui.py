"""The web server shows the whole graph with what was made, in a real browser; `make ui` stops what it started."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cluster.dagster_home import open_instance
from cluster.local import child, free_port, wait_for
from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.run import open_run
from flows.ui import _end_of, lost_code, server_environment
from tests.cluster.sockets import is_loopback, listening

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs/smoke.yaml"
CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1240,2240"
)
# No welcome dialog over the graph, no side bars, drawn from top to bottom.
REMEMBERED = {
    "communityNux": "1",
    "large-screen-nav-open": "false",
    "dagster-nav-collapsed": "true",
    "asset-graph-direction": '"vertical"',
}
REFRESH, POLL_S, DRAWN_S = "base", 1.0, 120.0

pytestmark = pytest.mark.slow


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Address of a web server on a history in which every asset was made once."""
    overrides = [f"storage={tmp_path / 'storage'}"]
    run = open_run(load_config(CONFIG, overrides), GRAPH.specs)
    with open_instance(Path(run.dagster_home)) as instance:
        instance.add_dynamic_partitions("refresh", [REFRESH])
        for name, spec in GRAPH.specs.items():
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


@pytest.mark.skipif(not shutil.which(CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver")
def test_the_graph_shows_every_asset_and_that_it_was_made(web_server: str, browser: webdriver.Chrome) -> None:
    open_graph(browser, web_server)
    partitioned = [name for name, spec in GRAPH.specs.items() if spec.partitions_def is not None]
    wait_until(lambda: all(name in shown(browser).split() for name in GRAPH.specs), "every asset is drawn")
    wait_until(lambda: shown(browser).count("100% filled") == len(partitioned), "every refresh is shown as made")
    wait_until(
        lambda: shown(browser).count("Materialized") == len(GRAPH.specs) - len(partitioned), "every other asset is, too"
    )


def open_graph(browser: webdriver.Chrome, address: str) -> None:
    """The graph of all assets, its groups opened, without side bars."""
    browser.get(f"{address}/robots.txt")  # any page of this origin, to change what the web server's pages remember
    for name, value in REMEMBERED.items():
        browser.execute_script("localStorage.setItem(arguments[0], arguments[1])", name, value)
    browser.get(f"{address}/asset-groups")
    wait_until(lambda: "Materialize all" in shown(browser), "the page comes up")
    browser.find_element(By.XPATH, "//input[@placeholder='Jump to…']/following::button[1]").click()
    ActionChains(browser).key_down(Keys.ALT).send_keys("e").key_up(Keys.ALT).perform()


def shown(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DRAWN_S
    while not happened():
        assert time.monotonic() < deadline, f"waited {DRAWN_S:g} s until {what}"
        time.sleep(POLL_S)


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    command = [sys.executable, "-m", "flows.ui", "--config", str(CONFIG), "--port", str(free_port())]
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    # A background job of a shell ignores Ctrl-C, and so would the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    served = subprocess.Popen(
        [*command, f"storage={storage}"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert served.stdout is not None
        lines = []
        while (line := served.stdout.readline()) != "Ctrl-C stops what was started\n":
            assert line, f"the servers ended after {lines}"
            lines.append(line)
        assert any("/asset-groups" in line for line in lines)
        started = processes_of(str(storage))
        assert {"raylet", "gcs_server"} < {process.name() for process in started}
        sockets = {place: name for process in started for place, name in listening(process).items()}
        assert {"raylet", "gcs_server"} < set(sockets.values())
        assert {place: name for place, name in sockets.items() if not is_loopback(place[0])} == {}
        served.send_signal(signal.SIGINT)
        assert served.wait(120) == 0
        assert [process for process in started if is_alive(process)] == []
    finally:
        served.terminate()
        served.wait(120)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process is running. One that has ended may stay listed until init reads its exit code."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def processes_of(storage: str) -> list[psutil.Process]:
    """All processes whose Dagster home is in this storage, except the one that started them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("DAGSTER_HOME", "").startswith(storage):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ({"locationOrLoadError": {"__typename": "PythonError"}}, True),
        ({"locationOrLoadError": {"__typename": "RepositoryLocation"}}, False),
        ({"locationOrLoadError": None}, False),  # it is loading
    ],
)
def test_a_dagster_that_lost_its_code_is_started_again(
    answer: dict[str, object], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"data": {"workspaceOrError": {"locationEntries": [answer]}}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr("flows.ui.LOOK_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert lost_code(url) == lost
        dagster = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])
        said = _end_of(dagster, url)
        assert said == ("Dagster lost the process that holds the code" if lost else "Dagster ended with 0")
        dagster.kill()
        dagster.wait()
        server.shutdown()
    assert not lost_code(url), "nobody answers any more"
