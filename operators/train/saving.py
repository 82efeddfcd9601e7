"""Saves checkpoints while training goes on: from a copy of the state in host memory, which a thread per worker writes.

DeepSpeed hands the state to its checkpoint engine; here that keeps a copy, and the thread lets DeepSpeed's own engine
write it. A checkpoint is complete when every worker has written its part. The workers tell each other with the sums of
a step, so no thread takes part in a collective, and training never waits for one of its own.

If the folder is a copy of one in a bucket, a part is written when it is in the bucket too. A bucket that cannot be
written does not end the training: a checkpoint that waits too long for it is given up, and older ones stay.

DeepSpeed's decoupled engine would hold the next optimizer step until the whole checkpoint is written.
"""

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from operators.train.checkpoint import (
    MARKER,
    STATE,
    CheckpointSpec,
    complete_checkpoints,
    digest,
    gathered,
    leads,
    marker_of,
    write_json,
)
from operators.train.node_copy import NodeCopy, persistently
from operators.train.stopping import NodeWarnings
from operators.train.trainer import NotFiniteError

Written = dict[str, tuple[int, str]]  # name below the checkpoint -> bytes and SHA-256
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """What one worker has written of a checkpoint.

    Attributes:
        files: on the disk.
        failed: why they could not be written; "" if they were.
        missing: why they are not in the bucket; "" if they are, or if there is none.
    """

    files: Written
    failed: str = ""
    missing: str = ""


@dataclass(frozen=True)
class _Unfinished:
    """A checkpoint whose parts are being written."""

    folder: Path
    step: int
    keep: int
    written: Future[_Part]


class Saver:
    """Saves the checkpoints of one engine. Every worker must make the same calls in the same order."""

    def __init__(
        self,
        engine: Any,
        spec: CheckpointSpec,
        *,
        background: bool = True,
        every_minutes: float = 0.0,
        copy: NodeCopy | None = None,
    ) -> None:
        """
        Args:
            engine: the DeepSpeed engine.
            spec: what its checkpoints belong to.
            background: write while training goes on; otherwise `save` returns when the checkpoint is complete.
            every_minutes: time after which `due` asks for a checkpoint; 0 never does.
            copy: if the folder of the training is a copy of one in a bucket.
        """
        self._engine, self._spec, self._copy = engine, spec, copy
        self._mates = copy.mates if copy else tuple(range(dist.get_world_size()))
        self._hurry = threading.Event()  # set while training waits for the bucket
        self._missing = ""  # why the last checkpoint is not in the bucket
        self._every_s = every_minutes * 60
        self._began = time.monotonic()  # of the last checkpoint
        self._stager = _stager(str(engine.device)) if background else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: _Unfinished | None = None
        self._settled: Future[None] | None = None
        self._waited_s = 0.0
        self._warnings = NodeWarnings()
        self.due = False  # whether time or a leaving node asks for a checkpoint; the same on every worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        # Not after other errors, which one worker may have alone: the others would wait for it.
        if kind is None or issubclass(kind, NotFiniteError):
            self.finish()
        self._hurry.set()
        self._thread.shutdown(wait=False)
        if self._stager is not None:
            self._stager.close()

    def save(self, checkpoints: Path, step: int, keep: int = 2) -> None:
        """Save the state after `step` finished steps, after the save before has ended.

        Args:
            checkpoints: a folder that all workers share, or those of a node.
            step: optimizer steps finished.
            keep: number of complete checkpoints to keep in the folder; older ones are removed.

        Raises:
            RuntimeError: on every worker, if one of them could not write the save before.
        """
        with self._waiting():
            self._end()
            self._hurry.clear()
            folder = checkpoints / f"step-{step:08d}"
            if leads(self._mates):
                shutil.rmtree(folder, ignore_errors=True)  # left by a killed attempt
                folder.mkdir(parents=True)
            if self._copy and dist.get_rank() == 0:
                self._copy.forget(folder)
            dist.barrier()
            copies = _Copies(self._engine.checkpoint_engine, self._stager)
            self._engine.checkpoint_engine = copies
            try:
                # Weights that are not trained, such as those under adapters, are loaded from the student itself.
                self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
            finally:
                self._engine.checkpoint_engine = copies.own
            written = self._thread.submit(self._write, copies, folder)
            self._unfinished = _Unfinished(folder, step, keep, written)
            self._began = time.monotonic()
            if self._stager is None:
                self._end()

    def say(self) -> tuple[float, float, float]:
        """What this worker adds to the sums of a step: whether a save is due, its part is written, or it failed."""
        late = dist.get_rank() == 0 and (0 < self._every_s <= time.monotonic() - self._began or self._warnings.is_new())
        written = self._unfinished.written if self._unfinished else None
        if written is None or not written.done():
            return float(late), 0.0, 0.0
        return float(late), 1.0, float(bool(written.result().failed))

    def hear(self, sums: Sequence[float]) -> None:
        """Take the sums of what all workers said, and complete the checkpoint if every part of it is written.

        Raises:
            RuntimeError: on every worker, if one of them could not write its part.
        """
        late, written, failed = sums
        self.due = late > 0
        if failed:
            self._hurry.set()  # the parts of the others are of no use any more
        if failed or written == dist.get_world_size():
            with self._waiting():
                self._complete()

    def finish(self) -> None:
        """Wait until the last save is complete and older ones are removed.

        Raises:
            RuntimeError: on every worker, if one of them could not write its part, on the disk or in the bucket.
        """
        with self._waiting():
            self._end()
            missing = next(filter(None, gathered(self._missing)), "") if self._copy else ""
        if self._copy and missing:
            raise RuntimeError(f"train: the last checkpoint could not be copied to {self._copy.home}: {missing}")

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
        self._hurry.set()
        self._complete()
        if self._settled is not None:
            self._settled.result()
        self._settled = None

    def _write(self, copies: "_Copies", folder: Path) -> _Part:
        """The thread's: write this worker's part, also to the bucket."""
        try:
            files = copies.write(folder, dist.get_rank() == 0)
        except Exception as error:  # noqa: BLE001 - all workers raise it, at the next step
            return _Part({}, failed=f"{type(error).__name__}: {' '.join(str(error).split())}")
        if self._copy is None:
            return _Part(files)
        push = partial(self._copy.push, folder, files)
        return _Part(files, missing=persistently(push, self._hurry, self._copy.there(folder)))

    def _complete(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        folder = unfinished.folder
        parts: list[_Part] = gathered(unfinished.written.result())
        failed = next((part.failed for part in parts if part.failed), "")
        self._missing = next((part.missing for part in parts if part.missing), "")
        if (failed or self._missing) and leads(self._mates):
            shutil.rmtree(folder, ignore_errors=True)
        if failed:
            raise RuntimeError(
                f"train: checkpoint {folder} could not be written: {failed}; free space there, or lower "
                "train.keep_checkpoints"
            )
        if self._missing and dist.get_rank() == 0:
            _LOG.warning("train: the checkpoint of step %d is given up: %s", unfinished.step, self._missing)
        if not self._missing and leads(self._mates):
            here = [parts[mate].files for mate in self._mates]
            write_json(folder / MARKER, marker_of(unfinished.step, self._spec, _union(here)))
            whole = marker_of(unfinished.step, self._spec, _union([part.files for part in parts]))
            self._settled = self._thread.submit(self._settle, folder, whole, unfinished.keep)
        dist.barrier()

    def _settle(self, folder: Path, marker: dict[str, Any], keep: int) -> None:
        """The thread's: make the checkpoint count in the bucket, and remove older ones."""
        if self._copy and dist.get_rank() == 0:
            commit = partial(self._copy.commit, folder, marker, keep)
            self._missing = persistently(commit, self._hurry, self._copy.there(folder))
        for old in complete_checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old.folder)


def save_checkpoint(
    engine: Any, checkpoints: Path, step: int, spec: CheckpointSpec, keep: int = 2, copy: NodeCopy | None = None
) -> None:
    """Save the engine's state after `step` finished steps, and wait for it; see `Saver.save`."""
    with Saver(engine, spec, background=False, copy=copy) as saver:
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
        return {str(file.relative_to(folder)): (file.stat().st_size, digest(file)) for file in [*self._paths, *beside]}


def _stager(device: str) -> Any:
    """The copier of torch's own checkpoints: tensors that share a storage still do, and its copy is used again."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    pinned = device != "cpu" and torch.accelerator.is_available()
    return DefaultStager(
        StagingOptions(pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned)
    )


def _union(parts: Sequence[Written]) -> Written:
    return {name: found for part in parts for name, found in part.items()}
