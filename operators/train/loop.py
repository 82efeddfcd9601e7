"""The body of each training worker: a plain DeepSpeed loop over the packs in their order, with NEFTune as a hook.

The loss of a step is the sum of the cross entropy over its supervised tokens, divided by their number over all
workers. So the curve is the same for any number of workers, even if they have different numbers of tokens.
"""

import gc
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from operators.model_copy import on_this_disk
from operators.student.packed_attention import attention_in_use
from operators.train.attention import count_hyper_layers, hyper_attention_routes
from operators.train.checkpoint import Checkpoint, given_checkpoint, newest_good, write_json
from operators.train.engine import loaded, prepare_process
from operators.train.export import ExportError, export_student
from operators.train.job import BEST, CHECKPOINTS, EXPORTED, FAILED, TrainJob
from operators.train.metrics import METRICS, metrics_file, read_metrics
from operators.train.pack_order import PackStore, pack_order
from operators.train.saving import Saver, save_checkpoint
from operators.train.trainer import NotFiniteError, Trainer
from operators.train.validation import History, history_of


def train_worker(settings_of_run: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker: restore or start, train, export; rank 0 writes metrics and the summary.

    An error that would repeat is stored before it is raised, so that restarted workers do not try again.

    Raises:
        ValueError: the packs are not those of the driver, or a checkpoint belongs to another run.
        NotFiniteError: loss or gradient is not finite.
        ExportError: the trained student cannot be written; there is a checkpoint of it.
    """
    job = settings_of_run["job"]
    if read_failure(Path(job.folder)):
        return
    try:
        _train(job)
    except Exception as error:
        if would_repeat(error):
            write_json(Path(job.folder) / CHECKPOINTS / FAILED, {"error": " ".join(str(error).split())})
        raise


def would_repeat(error: BaseException) -> bool:
    """Whether restarted workers would fail with the same error: true unless a worker, connection or file was lost."""
    certain = (NotFiniteError, ExportError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
    return memory or isinstance(error, certain)


def read_failure(folder: Path) -> str:
    """The stored error that would repeat, for the training in `folder`; "" if there is none."""
    path = folder / CHECKPOINTS / FAILED
    return str(json.loads(path.read_text())["error"]) if path.is_file() else ""


def _train(job: TrainJob) -> None:
    prepare_process(job.config)
    there = job.config.model_copy(update={"num_workers": dist.get_world_size()})  # if it is elastic, there may be fewer
    job = replace(job, student=on_this_disk(job.student), config=there)
    store = PackStore(job.files)
    if store.digest != job.digest:
        raise ValueError(f"train: packs have digest {store.digest}, the driver read {job.digest}; pack again")
    folder = Path(job.folder)
    checkpoint, notes = newest_good(folder / CHECKPOINTS, job.spec, job.copy)
    if checkpoint is None and job.config.resume_from:
        checkpoint = _given(job, store)
        notes.append(f"began with the checkpoint {checkpoint.folder} of another run, at its step {checkpoint.step}")
    start = checkpoint.step if checkpoint else 0
    if checkpoint and checkpoint.spec.world_size != dist.get_world_size():
        notes.append(
            f"went on at step {start} with {dist.get_world_size()} workers, after {checkpoint.spec.world_size} before"
        )
    with loaded(job, checkpoint) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        saved, finished, history = _steps(job, engine, trainer, start)
        if trainer.stop_asked:  # the driver asked for this, and wants no export
            return
        notes += trainer.notes
        if finished < trainer.total_steps:
            notes.append(f"stopped after {finished} of {trainer.total_steps} steps: no lower validation loss since")
        best = _best_checkpoint(job, history, finished, notes)
        exported = best.step if best else finished
        best_step = None if history.best is None else exported
        if best is None:
            _finish(job, engine, store, notes, best_step, finished if saved < finished else 0)
    if best is not None:
        del engine, noise, trainer
        _free_memory()
        with loaded(job, best) as (engine, _):
            _finish(job, engine, store, notes, best_step)


def _free_memory() -> None:
    """Free the memory of an engine that nothing names any more: two engines rarely fit into a GPU together."""
    gc.collect()  # DeepSpeed's objects refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _given(job: TrainJob, store: PackStore) -> Checkpoint:
    """The checkpoint of another run to begin with; it must leave at least one step to train."""
    found = given_checkpoint(job.config.resume_from, job.spec)
    total = job.config.total_steps(pack_order(store.document_lengths, job.config).steps_per_epoch)
    if found.step >= total:
        raise ValueError(
            f"train: train.resume_from: {found.folder} is at step {found.step}, and this run has {total} steps; give "
            "an earlier checkpoint, or raise train.max_steps or train.epochs"
        )
    return found


def _steps(job: TrainJob, engine: Any, trainer: Trainer, start: int) -> tuple[int, int, History]:
    """Train from `start` on; returns the step of the last checkpoint, the finished steps, and the validation losses."""
    folder, config, total = Path(job.folder), job.config, trainer.total_steps
    history = history_of(read_metrics(folder / METRICS), config.patience, start)
    evaluate_every, save_every = config.evaluate_every_steps, config.checkpoint_every_steps
    saved = finished = start
    dist.barrier()  # every worker has read the metrics before rank 0 shortens them
    saver = Saver(
        engine,
        job.spec,
        background=config.checkpoint_in_background,
        every_minutes=config.checkpoint_every_minutes,
        copy=job.copy,
    )
    with metrics_file(folder, start, job.began, config.trackers) as metrics, saver:
        while finished < total and not history.is_over:
            measured = replace(trainer.step(finished, saver.say), checkpoint_seconds=saver.waited())
            saver.hear(trainer.heard)
            finished += 1
            if evaluate_every and (finished % evaluate_every == 0 or finished == total):
                losses = trainer.evaluate()
                measured = replace(measured, **losses)
                if history.add(finished, losses["validation_loss"]):
                    saver.save(folder / CHECKPOINTS / BEST, finished, keep=1)
            metrics.record(measured, total)
            if (save_every and finished % save_every == 0) or saver.due or trainer.stop_asked:
                saver.save(folder / CHECKPOINTS, finished, config.keep_checkpoints)
                saved = finished
            if trainer.stop_asked:
                break
    return saved, finished, history


def _best_checkpoint(job: TrainJob, history: History, finished: int, notes: list[str]) -> Checkpoint | None:
    """The checkpoint to export instead of the last weights; None if those are the best, or nothing was evaluated."""
    if history.best is None:
        return None
    best = history.best
    text = f"exported the weights of step {best.step} of {finished}, with the lowest validation loss {best.loss:.4f}"
    if best.step == finished:
        notes.append(text)
        return None
    found, problems = newest_good(Path(job.folder) / CHECKPOINTS / BEST, job.spec, job.copy)
    if found is None or found.step != best.step:
        notes += [*problems, f"train: the best weights, of step {best.step}, are gone; exported the last instead"]
        return None
    notes.append(text)
    return found


def _finish(
    job: TrainJob, engine: Any, store: PackStore, notes: list[str], best_step: int | None, unsaved: int = 0
) -> None:
    """Export the student and write the summary; if the export fails, `unsaved` steps are saved in a checkpoint."""
    folder = Path(job.folder)
    try:
        changed = export_student(engine, job.student, folder, job.config.lora, job.chat_template)
    except ExportError:
        if unsaved:  # so that a finished training is not lost: the next attempt only exports
            save_checkpoint(engine, folder / CHECKPOINTS, unsaved, job.spec, copy=job.copy)
        raise
    notes += [f"generation config exported with {changed}"] if changed else []
    notes += hyper_attention_routes(engine.module, job.config, store.document_lengths)
    summary = {
        "identity": job.identity,
        "backend": dist.get_backend(),
        "attention_implementation": attention_in_use(engine.module, max(map(max, store.document_lengths))),
        "hyper_attention_layers": count_hyper_layers(job.student, job.config),
        "best_step": best_step,
        "notes": notes,
    }
    _write_summary(folder, summary)


def _write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Rank 0 writes that the student is complete; the driver makes the manifest from this."""
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if dist.get_rank() == 0:
        write_json(folder / CHECKPOINTS / EXPORTED, {**summary, "peak_rss_bytes": peaks})
