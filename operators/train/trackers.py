"""Sends the metrics of training to W&B and MLflow, beside metrics.jsonl and TensorBoard.

Each tracker is configured by its own environment variables: `WANDB_MODE=offline`, `WANDB_PROJECT`, `WANDB_API_KEY`;
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. After a restart the tracker's run of the same student continues.
"""

import importlib.util
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "mlflow"]
PACKAGES: dict[TrackerName, str] = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Tracker(Protocol):
    """Records the metrics of each step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record named metrics of a step; steps count from 0."""

    def close(self) -> None:
        """Write everything that is still buffered, and end the tracker's run."""


def missing_trackers(names: list[TrackerName]) -> str:
    """An error that names trackers that are not installed; "" if there are none."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    packages = " ".join(PACKAGES[name] for name in missing)
    return f"train.trackers: {', '.join(missing)} not installed; `pip install {packages}`, or leave the name out"


def open_trackers(names: list[TrackerName], folder: Path) -> list[Tracker]:
    """Start a run of each tracker, or continue the run of the same student.

    Args:
        names: trackers to open.
        folder: of the student; its name becomes the name of the run, and W&B writes its offline files there.

    Raises:
        ValueError: a tracker is not installed.
    """
    if missing := missing_trackers(names):
        raise ValueError(missing)
    makers: dict[TrackerName, Callable[[Path], Tracker]] = {"wandb": _Wandb, "mlflow": _MLflow}
    return [makers[name](folder) for name in names]


def _run_id(folder: Path) -> str:
    return sha256(str(folder).encode()).hexdigest()[:16]


class _Wandb:
    def __init__(self, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            dir=str(folder), name=folder.name, id=_run_id(folder), resume="allow", settings=settings
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its own process writes to the disk; the worker must not end before that


class _MLflow:
    def __init__(self, folder: Path) -> None:
        import mlflow

        found = mlflow.search_runs(
            filter_string=f"tags.student = '{_run_id(folder)}'", output_format="list", max_results=1
        )
        self._mlflow: Any = mlflow
        known = found[0].info.run_id if found else None
        mlflow.start_run(run_id=known, run_name=None if known else folder.name, tags={"student": _run_id(folder)})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
