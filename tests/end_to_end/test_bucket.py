"""The whole flow on a storage in a bucket, against moto's S3 server: twice, at once, and with a killed driver."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from cluster.bucket_lease import LEASE, LOST_AFTER_S, StorageBusyError
from cluster.lease import lease
from operators.files.atomic import open_filesystem
from operators.files.copies import files_below, read_text

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = b"planted-secret-of-the-tests"  # of tests/conftest.py
LOOK_S = 0.2


def command(storage: str, endpoint: str, model: str, *more: str) -> list[str]:
    settings = {
        "storage": storage,
        "storage_endpoint": endpoint,
        "student.model": model,
        "train.num_workers": 1,
        "train.checkpoint_every_steps": 1,
        "evaluate.judge": "false",
    }
    flow = [sys.executable, "flows/recycle_and_train.py", "--config", "configs/smoke.yaml"]
    return [*flow, *(f"{key}={value}" for key, value in settings.items()), *more]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without the store's address, which is a configuration key, and with local files in `tmp_path`."""
    local = {"XDG_STATE_HOME": f"{tmp_path}/state", "RAY_ADDRESS": "local", "PYTHONPATH": str(REPOSITORY)}
    return {name: value for name, value in os.environ.items() if name != "AWS_ENDPOINT_URL_S3"} | local


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def calls(storage: str) -> Counter[str]:
    """How often the ledger holds each call."""
    found: Counter[str] = Counter()
    for name in files_below(f"{storage}/ledger"):
        filesystem, path = open_filesystem(f"{storage}/ledger/{name}")
        found.update(pads.dataset(path, filesystem=filesystem).to_table(["call_key"])["call_key"].to_pylist())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_flow_lies_in_the_bucket_goes_on_after_a_kill_and_then_has_nothing_to_do(
    bucket: str, s3_server: str, tiny_model: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    storage = f"{bucket}/runs/smoke"
    flow = command(storage, s3_server, tiny_model)
    with (tmp_path / "out").open("wb") as out:
        killed = subprocess.Popen(flow, cwd=REPOSITORY, env=environment, stdout=out, stderr=out, start_new_session=True)
    while not any(name.startswith("recycled_instructions/") for name in files_below(f"{storage}/assets")):
        with suppress(subprocess.TimeoutExpired):
            killed.wait(LOOK_S)
        assert killed.returncode is None, (tmp_path / "out").read_text() + log_of(tmp_path)
    with pytest.raises(StorageBusyError, match="another run is writing"), lease(storage):
        pytest.fail("two runs hold the storage")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    lease_object = (
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket.removeprefix("s3://")].keys[f"runs/smoke/{LEASE}"]
    )
    lease_object.last_modified -= timedelta(seconds=LOST_AFTER_S)  # spares the next run a minute of waiting
    before = calls(storage)
    assert before

    finished = run(flow, environment)
    assert finished.returncode == 0, finished.stderr + finished.stdout + log_of(tmp_path)
    assert set(calls(storage).values()) == {1}
    assert calls(storage).keys() >= before.keys()
    names = set(files_below(storage))
    student = json.loads(read_text(f"{storage}/released.json") or "")["version"]
    assert {f"students/{student}/{name}" for name in ("manifest.json", "config.json", "model.safetensors")} <= names
    assert {
        f"evaluations/{student}.parquet",
        f"evaluations/{student}.base.json",
        "reports/smoke.html",
        "published/README.md",
        LEASE,
    } <= names
    assert not [name for name in names if re.search(r"/checkpoints/|unfinished", name)]
    assert not list(REPOSITORY.glob("s3:*"))

    local = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert local
    assert not [path for path in local if SECRET in path.read_bytes()]
    assert not [name for name in names if SECRET in content_of(f"{storage}/{name}")]

    again = run(flow, environment)
    assert again.returncode == 0, again.stderr
    assert "everything was up to date: no teacher call, no training" in again.stdout
    assert set(files_below(storage)) == names


def content_of(place: str) -> bytes:
    """The bytes of an object, and what is stored in the columns of a table, which are compressed."""
    filesystem, path = open_filesystem(place)
    with filesystem.open_input_stream(path) as stream:
        content = bytes(stream.read())
    if place.endswith(".parquet"):
        content += json.dumps(pq.read_table(pa.BufferReader(content)).to_pylist(), default=str).encode()
    return content


def log_of(tmp_path: Path) -> str:
    return "".join(file.read_text()[-3000:] for file in (tmp_path / "state").rglob("*.log"))
