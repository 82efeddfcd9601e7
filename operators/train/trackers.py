"""Experiment trackers by name, beside metrics.jsonl and TensorBoard: W&B and MLflow, set up by their own environment.

Where they write is theirs to know: `WANDB_MODE=offline`, `WANDB_PROJECT`, `WANDB_API_KEY`; `MLFLOW_TRACKING_URI`,
`MLFLOW_EXPERIMENT_NAME`. A run goes on under the name of its student's folder after a restart.
"""

import importlib.util
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "mlflow"]
PACKAGES: dict[TrackerName, str] = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Tracker(Protocol):
    """What takes the figures of each step."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record named figures of a step, which counts from 0."""

    def close(self) -> None:
        """Hand over what is left."""


def missing_trackers(names: list[TrackerName]) -> str:
    """What has to be installed first; "" if nothing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    packages = " ".join(PACKAGES[name] for name in missing)
    return f"train.trackers: {', '.join(missing)} not installed; `pip install {packages}`, or leave the name out"


def open_trackers(names: list[TrackerName], folder: Path) -> list[Tracker]:
    """Begin or continue a run of each tracker.

    Args:
        names: of the trackers.
        folder: the student's; its name is the run's, and W&B's offline files lie in it.

    Raises:
        ValueError: one is not installed.
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

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

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

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
