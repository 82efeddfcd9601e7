"""The metrics match the storage; the dashboard, the alerts and the scrape file use names that exist."""

import json
import os
import re
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from cluster.lease import lease
from cluster.local import free_port
from cluster.manifest import Manifest
from cluster.storage import AssetStore
from flows import metrics
from flows.metrics import PORT, StorageMetrics, serve_metrics
from flows.refresh_requests import GivenUp, Request, Requests
from flows.releases import refresh_lines
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss, Judgement

REPOSITORY = Path(__file__).resolve().parents[2]
MONITORING = REPOSITORY / "cluster" / "monitoring"
LIVE = re.compile(r"ray_(recycle_stage_(rows|tokens|queue)|vllm_num_requests_(waiting|running))")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Two refreshes, one of them recycled an hour ago; one given up; one released student."""
    finish(tmp_path, "raw_instructions", "a", {"": 3, "dropped:held_out": 1})
    finish(tmp_path, "raw_instructions", "b", {"": 2})
    measured = {"calls": 3, "failed_calls": 1, "prompt_tokens": 30, "generated_tokens": 12, "cost": 0.5}
    finish(tmp_path, "instruction_reflections", "a", {"": 3}, measured)
    made = finish(tmp_path, "recycled_instructions", "a", {"both": 3, "dropped:held_out": 1})
    os.utime(made, (time.time() - 3600,) * 2)
    Requests(str(tmp_path)).put(Request(key="c", given_up=GivenUp(at="", attempts=8, reason="disk")))
    loss = HeldOutLoss(base=2.0, student=1.5, num_tokens=10, num_rows=12)
    evaluation = Evaluation(held_out_loss=loss, judge=Judgement(num_pairs=4, wins=3, losses=1, win_margin=0.5))
    ReleaseHistory(str(tmp_path)).record("released", "v1", evaluation, ("because",))
    return tmp_path


def finish(
    storage: Path, asset: str, refresh: str, outcomes: dict[str, int], measured: dict[str, float] | None = None
) -> Path:
    folder = storage / "assets" / asset / f"refresh={refresh}"
    folder.mkdir(parents=True)
    manifest = Manifest(order=1, fingerprint="0", outcomes=outcomes, metrics=measured or {})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()
    return folder / "manifest.json"


def scraped(storage: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(StorageMetrics(str(storage), sys.stderr))
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_rows_calls_refreshes_losses_and_ages_are_those_of_the_storage(storage: Path) -> None:
    found = scraped(storage)
    assert found['recycle_rows{asset="raw_instructions",outcome="active"}'] == 5
    assert found['recycle_rows{asset="recycled_instructions",outcome="both"}'] == 3
    assert found['recycle_teacher_calls{asset="instruction_reflections",kind="failed"}'] == 1
    assert found['recycle_teacher_tokens{asset="instruction_reflections",kind="generated"}'] == 12
    assert found['recycle_teacher_cost{asset="instruction_reflections"}'] == 0.5
    for state in ("recycled", "not_recycled", "given_up"):
        assert found[f'recycle_refreshes{{state="{state}"}}'] == 1
    assert 3600 <= found["recycle_newest_refresh_age_seconds"] < 3700
    assert found['recycle_held_out_loss{model="student"}'] == 1.5
    assert found["recycle_win_margin"] == 0.5
    assert found['recycle_decisions{event="released"}'] == 1
    assert (found["recycle_storage_busy"], found["recycle_unreadable_parts"]) == (0, 0)
    with lease(str(storage)):
        assert scraped(storage)["recycle_storage_busy"] == 1


def test_the_newest_refresh_may_be_in_a_bundle(storage: Path) -> None:
    bundles = storage / "assets/recycled_instructions/bundles"
    bundles.mkdir()
    (bundles / "one.parquet").touch()
    assert 0 <= scraped(storage)["recycle_newest_refresh_age_seconds"] < 3600


def test_calls_of_a_judge_that_selects_are_calls_of_the_teacher(storage: Path) -> None:
    finish(storage, "selected_instructions", "a", {}, {"calls": 7, "cost": 3})
    found = scraped(storage)
    assert found['recycle_teacher_calls{asset="selected_instructions",kind="made"}'] == 7
    assert found['recycle_teacher_cost{asset="selected_instructions"}'] == 3
    [line] = [line for line in refresh_lines(AssetStore(str(storage))) if line.key == "a"]
    assert line.cost == 3.5


def test_a_broken_manifest_is_counted_and_hides_no_other_part(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / "assets/recycled_instructions/refresh=a/manifest.json").write_text("{")
    found = scraped(storage)
    assert found["recycle_unreadable_parts"] == 3
    assert capsys.readouterr().err.count("manifest.json cannot be read; delete") == 3
    assert found['recycle_held_out_loss{model="student"}'] == 1.5


def test_an_empty_storage_has_metrics(tmp_path: Path) -> None:
    assert scraped(tmp_path)['recycle_refreshes{state="recycled"}'] == 0


def test_dashboard_and_alerts_ask_for_names_that_exist(storage: Path) -> None:
    names = {name.partition("{")[0] for name in scraped(storage)} | {"up"}
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [rule["expr"] for rule in rules]
    used = {word for expr in asked for word in re.findall(r"\b(?:ray_\w+|recycle_\w+|up)\b(?=[{ \[)]|$)", expr)}
    assert len(used) > 12
    assert {name for name in used - names if not LIVE.fullmatch(name)} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_scrape_file_asks_where_the_metrics_are() -> None:
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job.get("static_configs") for job in jobs}
    assert targets["recycle"] == [{"targets": [f"127.0.0.1:{PORT}"]}]
    assert "ray" in targets


def test_the_command_serves_on_loopback_until_ctrl_c_and_refuses_what_is_not_there(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve_metrics([str(storage / "none")]) == 2
    assert serve_metrics([str(storage), "--port", "99999"]) == 2
    port, answers = free_port(), []

    class Asked:
        def wait(self) -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                answers.append(answer.read())
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "threading", SimpleNamespace(Event=Asked))
    assert serve_metrics([str(storage), "--port", str(port)]) == 0
    assert b'recycle_refreshes{state="given_up"} 1.0' in answers[0]
