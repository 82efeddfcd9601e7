"""The flow on a storage for one test, and a separate real Ray cluster for jobs and the daemon."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import AssetStore
from tests.flows.flow_runs import Flow, flow_in

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_cluster(default_of_jobs: Path) -> Iterator[str]:
    """Address of the jobs API of a cluster that was started in the repository root."""
    from cluster.local import free_port, local_cluster

    options = ["--num-cpus=2", "--object-store-memory=300000000"]
    environment = {**os.environ, "RECYCLE_CONFIG": str(default_of_jobs)}
    environment.pop("RAY_ADDRESS", None)
    log = default_of_jobs.parent / "ray.log"
    with local_cluster(free_port(), log, cwd=REPOSITORY, environment=environment, options=options) as address:
        yield address


@pytest.fixture(scope="session")
def default_of_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of jobs that do not name one. A test may overwrite it."""
    return tmp_path_factory.mktemp("jobs") / "default.yaml"


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    """The assets of the storage `tmp_path / "storage"`."""
    return AssetStore(str(tmp_path / "storage"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for source files, `tmp_path / "source"`."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def instance() -> Iterator[Any]:
    """A run history of Dagster in memory."""
    import dagster as dg

    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def small_run(tmp_path: Path, tiny_model: str) -> list[str]:
    """Overrides of configs/smoke.yaml: storage and source in `tmp_path`, a tiny student, one step, no judge."""
    return [
        f"storage={tmp_path / 'storage'}",
        f"source.path={tmp_path / 'source'}",
        f"student.model={tiny_model}",
        "evaluate.judge=false",
        "source.held_out_fraction=0.3",
        "evaluate.num_samples=1",
        "train.num_workers=1",
        "train.zero_stage=0",
        "train.max_steps=1",
    ]


@pytest.fixture
def flow(tmp_path: Path, tiny_model: str, local_ray: None) -> Flow:
    """A function that runs the flow on a storage for this test."""
    return flow_in(tmp_path, tiny_model)
