"""Records the measurements of each optimizer step: metrics.jsonl for programs, TensorBoard files for people."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from operators.train.trackers import Tracker, TrackerName, open_trackers

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_LOSSES = ("loss", "validation_loss", "quiet_loss")
_CURVES = (*_LOSSES, "grad_norm", "learning_rate", "neft_l2", "mfu", "goodput", "checkpoint_seconds")
_RATES = {"tokens": "tokens_per_second", "supervised_tokens": "supervised_tokens_per_second"}
_RATES |= {"padded_tokens": "padded_tokens_per_second", "model_flops": "model_flops_per_second"}


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    `loss` is in nats per supervised token, with noise. `neft_l2` is the mean norm of the noise over the step's
    documents, null without noise. `grad_norm` is the norm before clipping. `padded_tokens` are `tokens` plus those of
    dummies. `mfu` is the model's FLOPs as a share of the devices' peak, null if the peak is unknown. `validation_loss`
    and `quiet_loss` are measured after the step, without noise, on packs that are kept out and on as many packs that
    are trained on; null between evaluations. `checkpoint_seconds` is how long training waited for checkpoints between
    the step before and this one.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    supervised_tokens: int
    examples: int
    neft_l2: float | None
    seconds: float
    pid: int
    padded_tokens: int = 0
    model_flops: float = 0.0
    mfu: float | None = None
    validation_loss: float | None = None
    quiet_loss: float | None = None
    checkpoint_seconds: float = 0.0


class Metrics:
    """Writes rank 0's files; writes nothing on other ranks."""

    def __init__(
        self,
        file: TextIO | None,
        curves: Any,
        began: float = 0.0,
        seconds: float = 0.0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """
        Args:
            file, curves: where to write.
            began: Unix time at which the first attempt of this run began.
            seconds: time of the steps that earlier attempts finished.
            trackers: further places for the same figures.
        """
        self._file, self._curves, self._began, self._seconds = file, curves, began, seconds
        self._trackers = trackers

    def record(self, measured: StepMetrics, total_steps: int) -> None:
        """Write one step at once, so that a killed worker loses no finished line."""
        if self._file is None:
            return
        self._seconds += measured.seconds
        line = asdict(measured) | {rate: line_of / measured.seconds for rate, line_of in _amounts(measured)}
        # Goodput: the share of the time since the run began that was spent in finished steps, not in loading, saving or
        # restarts.
        line["goodput"] = min(1.0, self._seconds / max(time.time() - self._began, 1e-9))
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        figures = {f"train/{name}": line[name] for name in (*_CURVES, *_RATES.values()) if line[name] is not None}
        for name, figure in figures.items():
            self._curves.add_scalar(name, figure, measured.step)
        for tracker in self._trackers:
            tracker.log(figures, measured.step)
        from operators.progress import report_progress  # imports Ray, which a worker of Ray Train has loaded anyway

        report_progress("train", rows=1, tokens=measured.tokens, total=total_steps, note=f"loss {measured.loss:.3f}")


def _amounts(measured: StepMetrics) -> list[tuple[str, float]]:
    return [(rate, getattr(measured, name)) for name, rate in _RATES.items()]


@contextmanager
def metrics_file(folder: Path, start: int, began: float, trackers: Sequence[TrackerName] = ()) -> Iterator[Metrics]:
    """Rank 0's metrics, without lines of the steps from `start` on, which are trained again.

    `began` is the Unix time at which the run's first attempt began. TensorBoard hides the points that an earlier
    attempt wrote for steps from `start` on.

    Raises:
        ValueError: on rank 0, a tracker is not installed.
    """
    if dist.get_rank() != 0:
        yield Metrics(None, None)
        return
    from torch.utils.tensorboard import SummaryWriter

    path = folder / METRICS
    kept = [line for line in read_metrics(path) if line["step"] < start]
    shortened = path.with_name(f".{path.name}")
    shortened.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shortened.replace(path)
    further = open_trackers(list(trackers), folder)
    curves = SummaryWriter(str(folder / TENSORBOARD), purge_step=start or None)
    try:
        with path.open("a") as file:
            yield Metrics(file, curves, began, sum(line["seconds"] for line in kept), further)
    finally:
        curves.close()
        for tracker in further:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; empty if there is no such file."""
    return lines_of(path.read_text() if path.is_file() else "")


def lines_of(text: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a killed worker left incomplete."""
    return [json.loads(line) for line in text.split("\n")[:-1]]
