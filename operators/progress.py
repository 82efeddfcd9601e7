"""Live progress: stages report rows and tokens from anywhere on the cluster; the driver shows a bar or line per stage.

Reports go to one small named actor, and nobody waits for them: progress never slows or fails a stage.
"""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TextIO

import ray
from ray.util.metrics import Gauge
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from operators.driver_node import beside_driver
from operators.json_lines import JsonLines

BOARD_NAME = "recycle_progress"
SHOW_EVERY_S = 0.5
LOG_EVERY_S = 10.0  # if the output is not a terminal


@dataclass
class StageProgress:
    """What one stage has done so far; `started` and `seen` are seconds of the board's clock."""

    rows: int = 0
    tokens: int = 0
    total: int | None = None
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)


class ProgressBoard:
    """The actor's body: adds up reports by stage."""

    def __init__(self) -> None:
        self._stages: dict[str, StageProgress] = {}
        self._gauges = {
            name: Gauge(f"recycle_stage_{name}", f"{words} of a stage of the current run.", tag_keys=("stage",))
            for name, words in (("rows", "Rows done"), ("tokens", "Tokens"), ("queue", "Rows to come"))
        }

    def report(self, stage: str, rows: int, tokens: int, total: int | None, note: str, more: int | None) -> None:
        """Add to a stage's counts; `total` and `note` replace what was there, `more` is added to the total."""
        entry = self._stages.setdefault(stage, StageProgress())
        entry.rows += rows
        entry.tokens += tokens
        entry.total = entry.total if total is None else total
        entry.total = entry.total if more is None else (entry.total or 0) + more
        entry.note = note or entry.note
        entry.seen = time.monotonic()
        queue = 0 if entry.total is None else max(0, entry.total - entry.rows)
        for name, value in (("rows", entry.rows), ("tokens", entry.tokens), ("queue", queue)):
            self._gauges[name].set(value, tags={"stage": stage})

    def snapshot(self) -> dict[str, StageProgress]:
        """All stages in the order of their first report."""
        return self._stages


def board_name() -> str:
    """The name of this run's board: runs that share a cluster must not show each other's rows."""
    return f"{BOARD_NAME}_{ray.get_runtime_context().get_job_id()}"


def report_progress(
    stage: str, *, rows: int = 0, tokens: int = 0, total: int | None = None, more: int | None = None, note: str = ""
) -> None:
    """Report from a task, an actor, a training worker or the driver; does nothing if no board was started.

    Args:
        rows: rows (or training steps) finished since the last report.
        tokens: tokens generated (or trained on) since the last report.
        total: number of all rows, once known.
        more: rows to add to the total, for a stage that gets rows several times in a run, such as the judge.
        note: a few words to show after the line, such as a loss.
    """
    if not ray.is_initialized():  # otherwise `get_actor` would start a Ray cluster
        return
    try:
        board: Any = ray.get_actor(board_name(), namespace=BOARD_NAME)
    except ValueError:
        return
    board.report.remote(stage, rows, tokens, total, note, more)


def format_rate(progress: StageProgress) -> str:
    """Tokens per second since the stage began; empty in its first second and if tokens are not counted."""
    elapsed = progress.seen - progress.started
    return f"{progress.tokens / elapsed:.0f} tokens/s" if progress.tokens and elapsed > 1 else ""


def format_stage(stage: str, progress: StageProgress) -> str:
    """One line: rows, rate and time left, as far as they are known."""
    elapsed = max(progress.seen - progress.started, 1e-9)
    parts = [f"{stage:<24}", f"{progress.rows}/{progress.total if progress.total is not None else '?'} rows"]
    if progress.tokens:
        parts.append(f"{progress.tokens} tokens")
        parts.append(format_rate(progress))
    if progress.total and 0 < progress.rows < progress.total:
        parts.append(f"{elapsed / progress.rows * (progress.total - progress.rows):.0f} s left")
    if progress.total and not progress.rows:
        parts.append("starting")  # an engine needs half a minute or more
    parts.append(progress.note)
    return "  ".join(part for part in parts if part)


class ProgressLines:
    """Context manager of the driver: starts the board, shows it while inside, and leaves the last state of each stage.

    A terminal gets one bar per stage. Whenever something has changed, JSON lines get an object, and any other output
    gets a line.
    """

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show_until_stopped, daemon=True)
        self._display: Bars | Lines | Records
        if isinstance(out, JsonLines):
            self._display = Records(out)
        else:
            self._display = Bars(out) if out.isatty() else Lines(out)
        self._board: Any = None

    def __enter__(self) -> Self:
        actor = ray.remote(num_cpus=0)(ProgressBoard)
        here = beside_driver()
        named = actor.options(name=board_name(), namespace=BOARD_NAME, get_if_exists=True, scheduling_strategy=here)
        self._board = named.remote()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._display.close()
        ray.kill(self._board)

    def wait_for(self, stage: str, rows: int) -> None:
        """Block until a stage has reported this many rows; reports arrive with a delay."""
        while ray.get(self._board.snapshot.remote()).get(stage, StageProgress()).rows < rows:
            self._stop.wait(SHOW_EVERY_S / 10)

    def _show_until_stopped(self) -> None:
        while not self._stop.wait(self._display.every_s):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            stages: dict[str, StageProgress] = ray.get(self._board.snapshot.remote(), timeout=5)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return
        self._display.show(stages)


class Lines:
    """For a file: one line for each stage that has changed."""

    every_s = LOG_EVERY_S

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: dict[str, str] = {}

    def show(self, stages: Mapping[str, StageProgress]) -> None:
        """Write what has changed since the last call."""
        for stage, progress in stages.items():
            line = format_stage(stage, progress)
            if self._shown.get(stage) != line:
                self._out.write(f"{line}\n")
            self._shown[stage] = line
        self._out.flush()

    def close(self) -> None:
        """Do nothing, because nothing is open."""


class Records:
    """Writes an object for each stage that has changed, for collectors of logs."""

    every_s = LOG_EVERY_S

    def __init__(self, out: JsonLines) -> None:
        self._out = out
        self._shown: dict[str, tuple[Any, ...]] = {}

    def show(self, stages: Mapping[str, StageProgress]) -> None:
        """Write what has changed since the last call: stage, rows, total, tokens and the note as the message."""
        for stage, progress in stages.items():
            now = (progress.rows, progress.total, progress.tokens, progress.note)
            if self._shown.get(stage) != now:
                counts = {"rows": progress.rows, "total": progress.total, "tokens": progress.tokens}
                self._out.record(progress.note or "progress", "info", stage=stage, **counts)
            self._shown[stage] = now

    def close(self) -> None:
        """Do nothing, because nothing is open."""


class Bars:
    """For a terminal: one bar a stage, with rows, rate, time left and a note."""

    every_s = SHOW_EVERY_S

    def __init__(self, out: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[rows]}", markup=False),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=out),
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, stages: Mapping[str, StageProgress]) -> None:
        """Draw the stages; the first call starts the drawing."""
        self._progress.start()
        for stage, progress in stages.items():
            rows = f"{progress.rows}/{'?' if progress.total is None else progress.total} rows"
            texts: dict[str, Any] = {"rows": rows, "rate": format_rate(progress), "note": progress.note}
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=progress.total, **texts)
            self._progress.update(self._tasks[stage], completed=progress.rows, total=progress.total, **texts)

    def close(self) -> None:
        """Leave the last state on the terminal; the bar of a stage that never knew its total is drawn full."""
        for task in self._progress.tasks:
            if task.total is None:
                self._progress.update(task.id, total=task.completed)
        self._progress.stop()
