"""Saves checkpoints while training goes on: from a copy of the state in host memory, which a thread per worker writes.

DeepSpeed hands the state to its checkpoint engine; here that keeps a copy, and the thread lets DeepSpeed's own engine
write it. A checkpoint is complete when every worker has written its part. The workers tell each other with the sums of
a step, so no thread takes part in a collective, and training never waits for one of its own.

DeepSpeed's decoupled engine would hold the next optimizer step until the whole checkpoint is written.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from operators.train.checkpoint import STATE, CheckpointSpec, complete_checkpoints, write_marker
from operators.train.trainer import NotFiniteError

Written = dict[str, tuple[int, str]]  # name below the checkpoint -> bytes and SHA-256


@dataclass(frozen=True)
class _Unfinished:
    """A checkpoint whose parts are being written."""

    folder: Path
    step: int
    keep: int
    written: Future[Written]


class Saver:
    """Saves the checkpoints of one engine. Every worker must make the same calls in the same order."""

    def __init__(
        self, engine: Any, spec: CheckpointSpec, *, background: bool = True, every_minutes: float = 0.0
    ) -> None:
        """
        Args:
            engine: the DeepSpeed engine.
            spec: what its checkpoints belong to.
            background: write while training goes on; otherwise `save` returns when the checkpoint is complete.
            every_minutes: time after which `due` asks for a checkpoint; 0 never does.
        """
        self._engine, self._spec = engine, spec
        self._every_s = every_minutes * 60
        self._began = time.monotonic()  # of the last checkpoint
        self._stager = _stager(str(engine.device)) if background else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: _Unfinished | None = None
        self._removal: Future[None] | None = None
        self._waited_s = 0.0
        self.due = False  # whether time asks for a checkpoint; the same on every worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        # Not after other errors, which one worker may have alone: the others would wait for it.
        if kind is None or issubclass(kind, NotFiniteError):
            self.finish()
        self._thread.shutdown(wait=False)
        if self._stager is not None:
            self._stager.close()

    def save(self, checkpoints: Path, step: int, keep: int = 2) -> None:
        """Save the state after `step` finished steps, after the save before has ended.

        Args:
            checkpoints: a folder that all workers share.
            step: optimizer steps finished.
            keep: number of complete checkpoints to keep in the folder; older ones are removed.

        Raises:
            RuntimeError: on every worker, if one of them could not write the save before.
        """
        with self._waiting():
            self._end()
            folder = checkpoints / f"step-{step:08d}"
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # left by a killed attempt
                folder.mkdir(parents=True)
            dist.barrier()
            copies = _Copies(self._engine.checkpoint_engine, self._stager)
            self._engine.checkpoint_engine = copies
            try:
                # Weights that are not trained, such as those under adapters, are loaded from the student itself.
                self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
            finally:
                self._engine.checkpoint_engine = copies.own
            written = self._thread.submit(copies.write, folder, dist.get_rank() == 0)
            self._unfinished = _Unfinished(folder, step, keep, written)
            self._began = time.monotonic()
            if self._stager is None:
                self._end()

    def say(self) -> tuple[float, float, float]:
        """What this worker adds to the sums of a step: whether a save is due, its part is written, or it failed."""
        late = dist.get_rank() == 0 and 0 < self._every_s <= time.monotonic() - self._began
        written = self._unfinished.written if self._unfinished else None
        if written is None or not written.done():
            return float(late), 0.0, 0.0
        return float(late), 1.0, float(written.exception() is not None)

    def hear(self, sums: Sequence[float]) -> None:
        """Take the sums of what all workers said, and complete the checkpoint if every part of it is written.

        Raises:
            RuntimeError: on every worker, if one of them could not write its part.
        """
        late, written, failed = sums
        self.due = late > 0
        if failed or written == dist.get_world_size():
            with self._waiting():
                self._complete()

    def finish(self) -> None:
        """Wait until the last save is complete and older ones are removed.

        Raises:
            RuntimeError: on every worker, if one of them could not write its part.
        """
        with self._waiting():
            self._end()

    def waited(self) -> float:
        """Seconds that training has waited for checkpoints since the last call."""
        seconds, self._waited_s = self._waited_s, 0.0
        return seconds

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - started

    def _end(self) -> None:
        self._complete()
        if self._removal is not None:
            self._removal.result()
        self._removal = None

    def _complete(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        folder, parts, problem = unfinished.folder, *_parts(unfinished.written)
        if problem:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(
                f"train: checkpoint {folder} could not be written: {problem}; free space there, or lower "
                "train.keep_checkpoints"
            )
        if dist.get_rank() == 0:
            write_marker(folder, unfinished.step, self._spec, parts)
            self._removal = self._thread.submit(_remove_old, folder.parent, unfinished.keep)
        dist.barrier()


def save_checkpoint(engine: Any, checkpoints: Path, step: int, spec: CheckpointSpec, keep: int = 2) -> None:
    """Save the engine's state after `step` finished steps, and wait for it; see `Saver.save`."""
    with Saver(engine, spec, background=False) as saver:
        saver.save(checkpoints, step, keep)


class _Copies:
    """Takes the place of DeepSpeed's checkpoint engine during a save, and keeps copies of what that is to write."""

    def __init__(self, own: Any, stager: Any) -> None:
        self.own, self._stager = own, stager
        self._kept: list[tuple[Any, str]] = []
        self._paths: list[Path] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the state, or write it at once if there is nothing to copy with."""
        self._paths.append(Path(path))
        if self._stager is None:
            self.own.save(state_dict, path)
        else:
            self._kept.append((self._stager.stage(state_dict), path))

    def write(self, folder: Path, first: bool) -> Written:
        """Write what was kept; the first worker answers for what DeepSpeed put beside it, too."""
        for state, path in self._kept:
            self.own.save(state, path)
        self._kept.clear()
        beside = [file for file in folder.iterdir() if file.is_file()] if first else []
        return {str(file.relative_to(folder)): (file.stat().st_size, _digest(file)) for file in [*self._paths, *beside]}


def _stager(device: str) -> Any:
    """The copier of torch's own checkpoints: tensors that share a storage still do, and its copy is used again."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    pinned = device != "cpu" and torch.accelerator.is_available()
    return DefaultStager(
        StagingOptions(pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned)
    )


def _parts(written: Future[Written]) -> tuple[Written, str]:
    """What all workers have written, and the first problem of one; every worker must call this."""
    problem = written.exception()
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())}" if problem else ""
    own = ({} if problem else written.result(), text)
    every = [own] * dist.get_world_size()
    dist.all_gather_object(every, own)
    files = {name: found for part, _ in every for name, found in part.items()}
    return files, next((text for _, text in every if text), "")


def _remove_old(checkpoints: Path, keep: int) -> None:
    for old in complete_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old.folder)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
