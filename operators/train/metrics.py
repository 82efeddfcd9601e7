"""What a run measures of each optimizer step: metrics.jsonl for programs, TensorBoard's files beside it for people."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from operators.progress import report_progress

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_CURVES = ("loss", "grad_norm", "learning_rate", "neft_l2")


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss in nats per supervised token, with the noise on; `neft_l2` is the mean norm of
    the noise over the step's documents, null without noise; `grad_norm` is before clipping, null under ZeRO 0 in fp32,
    where DeepSpeed clips but does not tell.
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


class Metrics:
    """Rank 0's files; on other ranks nothing is written."""

    def __init__(self, file: TextIO | None, curves: Any) -> None:
        self._file, self._curves = file, curves

    def record(self, measured: StepMetrics, total_steps: int) -> None:
        """Write one step down, at once: a killed worker loses no finished line."""
        if self._file is None:
            return
        self._file.write(json.dumps(asdict(measured)) + "\n")
        self._file.flush()
        for name in _CURVES:
            value = getattr(measured, name)
            if value is not None:
                self._curves.add_scalar(f"train/{name}", value, measured.step)
        self._curves.add_scalar("train/tokens_per_second", measured.tokens / measured.seconds, measured.step)
        report_progress("train", rows=1, tokens=measured.tokens, total=total_steps, note=f"loss {measured.loss:.3f}")


@contextmanager
def metrics_file(folder: Path, start: int) -> Iterator[Metrics]:
    """Rank 0's metrics, cut back to the steps before `start`: lines of lost steps are measured again.

    TensorBoard hides what an earlier attempt wrote of the steps from `start` on.
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
            yield Metrics(file, curves)
    finally:
        curves.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed worker left half written is not one."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
