"""kill -9 of job, driver or worker in the middle of a reflection: stored replies are kept, and no row is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ROWS, BATCH, BATCHES = 600, 4, 2
IN_FLIGHT = 3 * BATCH * BATCHES  # see dispatch.BATCHES_IN_FLIGHT

Kill = Callable[[subprocess.Popen[bytes]], None]


def command(tmp_path: Path, tiny_model: str) -> list[str]:
    flow = REPOSITORY / "flows" / "recycle_and_train.py"
    settings = {
        "storage": tmp_path / "storage",
        "source.path": tmp_path / "source.jsonl",
        "source.held_out_fraction": 0,
        "student.model": tiny_model,
        "teacher.batch_rows": BATCH,
        "teacher.concurrent_batches": BATCHES,
        "train.num_workers": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    selected = ["--select", "raw_instructions,instruction_reflections"]
    return [sys.executable, str(flow), "--config", "configs/smoke.yaml", *overrides, *selected]


def records(tmp_path: Path) -> Counter[str]:
    files = (tmp_path / "storage" / "ledger" / "reflect_instructions").glob("*.parquet")
    tables = [pq.read_table(file, columns=["call_key"]) for file in files]
    return Counter(pa.concat_tables(tables)["call_key"].to_pylist() if tables else [])


def kill_the_job(job: subprocess.Popen[bytes]) -> None:
    os.killpg(job.pid, signal.SIGKILL)


def kill_the_driver(job: subprocess.Popen[bytes]) -> None:
    os.kill(job.pid, signal.SIGKILL)


def kill_a_worker(job: subprocess.Popen[bytes]) -> None:
    """One that is making calls, or storing replies."""
    while True:
        assert job.poll() is None, "the run ended before a worker could be killed"
        for child in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::MapBatches"):
                    child.kill()
                    return


@pytest.mark.slow
@pytest.mark.long  # `make test` kills a whole job in test_bucket.py
@pytest.mark.parametrize("kill", [kill_the_job, kill_the_driver, kill_a_worker])
def test_only_calls_in_flight_are_made_twice(tmp_path: Path, tiny_model: str, kill: Kill) -> None:
    rows = [{"instruction": f"Name river number {n} of the world.", "output": f"River {n}."} for n in range(ROWS)]
    (tmp_path / "source.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = command(tmp_path, tiny_model)
    job = subprocess.Popen(
        run, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while sum(records(tmp_path).values()) < ROWS // 10:
        assert job.poll() is None, "the run ended before it could be killed"
        time.sleep(0.2)  # polls the disk; the result is asserted below
    kill(job)
    before = records(tmp_path)
    assert ROWS // 10 <= sum(before.values()) < ROWS
    if kill is kill_a_worker:  # Ray replaces it, and the run goes on
        assert job.wait(timeout=500) == 0
    else:
        assert job.wait() == -signal.SIGKILL
        finished = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)
        assert finished.returncode == 0, finished.stderr
    after = records(tmp_path)
    assert len(after) == ROWS
    assert sum(after.values()) - ROWS <= IN_FLIGHT
    manifest = json.loads((tmp_path / "storage/assets/instruction_reflections/refresh=base/manifest.json").read_text())
    assert manifest["outcomes"] == {"": ROWS}
    if kill is not kill_a_worker:
        assert manifest["metrics"]["cached_calls"] >= len(before)
