"""The real daemon, on a real cluster: a new file becomes one refresh, which makes calls for its own rows only."""

import json
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest
from dagster._core.scheduler.instigation import InstigatorType, TickStatus

from cluster.dagster_home import open_instance
from cluster.lease import is_leased
from cluster.local import free_port
from cluster.manifest import Manifest
from flows.config import load_config
from flows.launch import run_flow
from flows.recycle_and_train import GRAPH
from flows.refreshes import show_refreshes
from flows.run import Run, open_run
from flows.ui import serving
from operators.columns import PACKED
from operators.read.drop_seen import SEEN

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs/smoke.yaml"
POLL_S, REFRESH_S, TICK_S = 1.0, 600.0, 240.0
FIRST, SECOND = 8, 4

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture
def overrides(small_run: list[str]) -> list[str]:
    return [*small_run, "schedule.active=true", "schedule.sensor_seconds=2", "schedule.settle_seconds=1"]


@pytest.fixture
def run(overrides: list[str]) -> Run:
    return open_run(load_config(CONFIG, overrides), GRAPH.specs)


@pytest.fixture
def daemon(
    run: Run, overrides: list[str], ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """The instance that the servers of `make ui` work on."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster)
    with serving(run, CONFIG, overrides, free_port(), StringIO()), open_instance(Path(run.dagster_home)) as instance:
        yield instance


def test_a_new_file_becomes_one_refresh_that_pays_for_its_rows_only(
    run: Run, daemon: dg.DagsterInstance, tmp_path: Path, overrides: list[str]
) -> None:
    drop(tmp_path, "first.jsonl", FIRST)
    the_command_line_works_beside(run, overrides)
    [first] = finished_runs(daemon, 1)
    drop(tmp_path, "second.jsonl", FIRST + SECOND)  # contains the rows of the first file too
    _, second = finished_runs(daemon, 2)
    wait_until(lambda: idle_ticks(daemon) > 1, TICK_S, "a third look at the source")
    assert len(daemon.get_runs()) == 2

    keys = [str(one.tags["dagster/partition"]) for one in (first, second)]
    assert sorted(run.store.refreshes("recycled_instructions")) == sorted(keys)
    calls = [manifest(run, "instruction_reflections", key).metrics for key in keys]
    active = [manifest(run, "raw_instructions", key).outcomes[""] for key in keys]
    assert manifest(run, "raw_instructions", keys[1]).outcomes[SEEN] == FIRST  # those held out are seen too
    assert [figures["calls"] for figures in calls] == active
    assert sum(figures["cached_calls"] for figures in calls) == 0
    assert ledger_rows(run, "reflect_instructions") == sum(active)
    assert packed_rows(run) == sum(active)
    assert all(one.tags.get("dagster/sensor_name") for one in (first, second))


def the_command_line_works_beside(run: Run, overrides: list[str]) -> None:
    """While a run of the daemon holds the storage, refreshes are listed, and a second run is refused with one line."""
    wait_until(lambda: is_leased(run.config.storage), TICK_S, "the daemon's run to hold the storage")
    out, err = StringIO(), StringIO()
    assert show_refreshes([run.config.storage], out, err) == 0, err.getvalue()
    assert len(out.getvalue().splitlines()) == 1
    assert run_flow(GRAPH, ["--config", str(CONFIG), *overrides], (out, err)) == 1
    assert err.getvalue().startswith("storage: another run is writing to ")
    assert len(err.getvalue().splitlines()) == 1


def drop(tmp_path: Path, name: str, count: int) -> None:
    """Write records under another name, then rename the file, as the documentation asks."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    records = [
        {"instruction": f"Name {number + 2} things that are green.", "input": "", "output": "Grass and leaves."}
        for number in range(count)
    ]
    aside = tmp_path / name
    aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    aside.rename(source / name)


def finished_runs(instance: dg.DagsterInstance, count: int) -> list[dg.DagsterRun]:
    """Wait until `count` runs have succeeded, and return them, oldest first."""

    def ended() -> bool:
        runs = instance.get_runs()
        assert not [one for one in runs if one.status == dg.DagsterRunStatus.FAILURE], failures(instance)
        return len(runs) >= count and all(one.is_finished for one in runs)

    wait_until(ended, REFRESH_S, f"run {count} to end")
    return list(reversed(instance.get_runs()))


def failures(instance: dg.DagsterInstance) -> str:
    """Messages about failed runs in the event logs."""
    [failed, *_] = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    return "\n".join(entry.user_message + str(entry.dagster_event) for entry in instance.all_logs(failed.run_id)[-6:])


def idle_ticks(instance: dg.DagsterInstance) -> int:
    """How often the sensor found nothing to do after the last run ended."""
    [state] = instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
    ended = max(instance.get_run_records(), key=lambda record: record.end_time or 0).end_time
    ticks = instance.get_ticks(
        state.instigator_origin_id, state.selector_id, after=ended, statuses=[TickStatus.SKIPPED]
    )
    return len([tick for tick in ticks if "no file that no refresh has taken" in str(tick.skip_reason)])


def wait_until(happened: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(POLL_S)


def manifest(run: Run, asset: str, refresh: str | None = None) -> Manifest:
    found = run.store.manifest(asset, refresh)
    assert found is not None, (asset, refresh)
    return found


def ledger_rows(run: Run, stage: str) -> int:
    return sum(pq.read_metadata(file).num_rows for file in Path(run.config.storage, "ledger", stage).glob("*.parquet"))


def packed_rows(run: Run) -> int:
    """Rows of all refreshes that are in packs."""
    held = manifest(run, "packed_sequences")
    assert held.outcomes[PACKED] > 0
    return int(held.metrics["rows"])
