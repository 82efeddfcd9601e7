"""What a run measures of each optimizer step: metrics.jsonl for programs, TensorBoard's files beside it for people."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_CURVES = ("loss", "grad_norm", "learning_rate", "neft_l2", "mfu", "validation_loss", "quiet_loss", "goodput")
_RATES = {"tokens": "tokens_per_second", "supervised_tokens": "supervised_tokens_per_second"}
_RATES |= {"padded_tokens": "padded_tokens_per_second", "model_flops": "model_flops_per_second"}


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss in nats per supervised token, with the noise on; `neft_l2` is the mean norm of
    the noise over the step's documents, null without noise; `grad_norm` is before clipping, null under ZeRO 0 in fp32,
    where DeepSpeed clips but does not tell. `padded_tokens` are `tokens` and those of dummies. `mfu` is the share of
    the devices' peak that the model's FLOPs need, null where the peak is not known. `validation_loss` and `quiet_loss`
    are without noise and after the step, of packs that are kept out and of as many that are trained on; null between
    evaluations.
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


class Metrics:
    """Rank 0's files; on other ranks nothing is written."""

    def __init__(self, file: TextIO | None, curves: Any, began: float = 0.0, seconds: float = 0.0) -> None:
        """
        Args:
            file, curves: where to write.
            began: Unix time at which the first attempt of this run began.
            seconds: of the steps that were kept from earlier attempts.
        """
        self._file, self._curves, self._began, self._seconds = file, curves, began, seconds

    def record(self, measured: StepMetrics, total_steps: int) -> None:
        """Write one step down, at once: a killed worker loses no finished line."""
        if self._file is None:
            return
        self._seconds += measured.seconds
        line = asdict(measured) | {rate: line_of / measured.seconds for rate, line_of in _amounts(measured)}
        # The share of the time since the run began that went into steps which count: not loading, saving or restarts.
        line["goodput"] = min(1.0, self._seconds / max(time.time() - self._began, 1e-9))
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name in (*_CURVES, *_RATES.values()):
            if line[name] is not None:
                self._curves.add_scalar(f"train/{name}", line[name], measured.step)
        from operators.progress import report_progress  # Ray, which a worker of Ray Train has anyway

        report_progress("train", rows=1, tokens=measured.tokens, total=total_steps, note=f"loss {measured.loss:.3f}")


def _amounts(measured: StepMetrics) -> list[tuple[str, float]]:
    return [(rate, getattr(measured, name)) for name, rate in _RATES.items()]


@contextmanager
def metrics_file(folder: Path, start: int, began: float) -> Iterator[Metrics]:
    """Rank 0's metrics, cut back to the steps before `start`: lines of lost steps are measured again.

    `began` is the Unix time at which the run's first attempt began. TensorBoard hides what an earlier attempt wrote of
    the steps from `start` on.
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
    curves = SummaryWriter(str(folder / TENSORBOARD), purge_step=start or None)
    try:
        with path.open("a") as file:
            yield Metrics(file, curves, began, sum(line["seconds"] for line in kept))
    finally:
        curves.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if there is no such file."""
    return lines_of(path.read_text() if path.is_file() else "")


def lines_of(text: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed worker left half written is not one."""
    return [json.loads(line) for line in text.split("\n")[:-1]]
