"""What each training worker does: a plain DeepSpeed loop over the plan, with NEFTune as a hook.

The loss of a step is the sum of the cross entropy over its supervised tokens, divided by their number over all
workers; so the curve is the same for any number of workers, however many tokens each happens to hold.
"""

import json
import math
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kernels.neftune import EmbeddingNoise, batch_of_pack
from operators.student.encode import load_tokenizer
from operators.student.packed_attention import attention_in_use
from operators.student.packed_loss import summed_loss
from operators.train.attention import count_hyper_layers, hyper_attention_routes
from operators.train.checkpoint import Checkpoint, newest_good, save_checkpoint, write_json
from operators.train.engine import loaded, prepare_process
from operators.train.export import ExportError, export_student
from operators.train.job import BEST, CHECKPOINTS, EXPORTED, FAILED, TrainJob
from operators.train.metrics import METRICS, StepMetrics, metrics_file, read_metrics
from operators.train.pack_order import PackStore, dummy_pack, pack_order
from operators.train.throughput import model_cost, peak_flops
from operators.train.validation import History, history_of, validation_packs


class NotFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number; a restart would give the same."""


class Trainer:
    """One worker's engine, packs and their order."""

    def __init__(self, job: TrainJob, engine: Any, noise: EmbeddingNoise, store: PackStore) -> None:
        self._job, self._engine, self._noise, self._store = job, engine, noise, store
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._order = pack_order(store.document_lengths, job.config)
        self._dummy = dummy_pack(load_tokenizer(job.student).eos_token_id or 0)
        self._cost, self._peak = model_cost(engine.module), peak_flops(str(engine.device))
        kept_out = validation_packs(len(store), job.config)
        trained = [index for index in range(len(store)) if index not in set(kept_out)]
        self._validation, self._quiet = kept_out, trained[: len(kept_out)]
        self.total_steps = job.config.total_steps(self._order.steps_per_epoch)

    def step(self, step: int) -> StepMetrics:
        """One optimizer step of all workers together.

        Raises:
            NotFiniteError: the loss is not a finite number, and nothing was updated; or the gradient is not, and the
                weights are spoiled.
        """
        started = time.monotonic()
        config, packs = self._job.config, self._order.packs_of(step)
        supervised = self._store.supervised_tokens(packs)
        rate = config.learning_rate_at(step, self.total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        loss_sum, l2_sum, documents = self._accumulate(step, supervised)
        if not math.isfinite(loss_sum):
            raise NotFiniteError(
                f"train: loss at step {step} is {loss_sum}, and nothing was updated; lower train.learning_rate "
                f"({config.learning_rate}) or use train.precision: fp32"
            )
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise NotFiniteError(
                f"train: norm of the gradient at step {step} is {float(norm)} with a loss of {loss_sum / supervised}; "
                f"lower train.learning_rate ({config.learning_rate}) or use train.precision: fp32"
            )
        seconds, tokens = time.monotonic() - started, self._store.tokens(packs)
        flops = sum(self._cost.flops(self._store.document_lengths[index]) for index in packs)
        dummies = self._order.micro_steps(step, self._world_size) * self._world_size - len(packs)
        return StepMetrics(
            step=step,
            epoch=self._order.epoch(step),
            loss=loss_sum / supervised,
            grad_norm=None if norm is None else float(norm),
            learning_rate=rate,
            tokens=tokens,
            supervised_tokens=supervised,
            examples=self._store.examples(packs),
            neft_l2=l2_sum / documents if documents else None,
            seconds=seconds,
            pid=os.getpid(),
            padded_tokens=tokens + dummies * len(self._dummy.input_ids),
            model_flops=flops,
            mfu=flops / seconds / (self._peak * self._world_size) if self._peak else None,
        )

    def evaluate(self) -> dict[str, float]:
        """Loss without noise of the packs that are kept out, and of as many that are trained on; all workers together.

        Raises:
            NotFiniteError: one of them is not a finite number.
        """
        found = {"validation_loss": self._mean_loss(self._validation), "quiet_loss": self._mean_loss(self._quiet)}
        for name, loss in found.items():
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"train: {name} is {loss}; lower train.learning_rate ({self._job.config.learning_rate}) or use "
                    "train.precision: fp32"
                )
        return found

    @torch.no_grad()
    def _mean_loss(self, indices: list[int]) -> float:
        """In nats per supervised token; each worker reads as many packs as every other, dummies included."""
        device = str(self._engine.device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        self._engine.eval()
        for place in range(self._rank, -(-len(indices) // self._world_size) * self._world_size, self._world_size):
            pack = self._store.pack(indices[place]) if place < len(indices) else self._dummy
            total += summed_loss(self._engine, pack, device).double()
        self._engine.train()
        dist.all_reduce(total)
        return total.item() / self._store.supervised_tokens(indices)

    def _accumulate(self, step: int, supervised: int) -> tuple[float, float, float]:
        """Forward and backward passes of a step; all workers' sums of loss and noise norms, and their documents.

        The host waits for the device once, here, so that nothing is updated before the loss is known to be finite.
        """
        device = str(self._engine.device)
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        config, share = self._job.config, self._order.share(step, self._rank, self._world_size)
        for place, index in enumerate(share):
            pack = self._dummy if index is None else self._store.pack(index)
            last = place == len(share) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            # Dropout, of adapters or of the student, is a function of the pack: the same on any number of workers.
            torch.manual_seed(_seed_of(config.seed, step, index))
            self._noise.set_batch(
                batch_of_pack(
                    pack.document_lengths, pack.document_uids, len(pack.input_ids), self._order.epoch(step), device
                )
            )
            loss_sum = summed_loss(self._engine, pack, device)
            # DeepSpeed averages gradients over the workers; times world size, the mean becomes the sum.
            self._engine.backward(loss_sum * (self._world_size / supervised), scale_wrt_gas=False)
            l2, count = self._noise.l2_sum()
            totals += torch.stack([loss_sum.detach().double(), l2.double(), torch.full_like(l2, count).double()])
            if not last:
                self._engine.step()  # counts the micro-step
        dist.all_reduce(totals)
        loss_sum, l2_sum, documents = totals.tolist()
        return loss_sum, l2_sum, documents


def _seed_of(seed: int, step: int, pack: int | None) -> int:
    return int(np.random.SeedSequence([seed, step, 0 if pack is None else pack]).generate_state(1, np.uint64)[0]) >> 1


def train_worker(settings_of_run: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker: restore or start, train, export; rank 0 writes metrics and the summary.

    An error that would repeat is written down before it is raised, so that restarted workers do not try it again.

    Raises:
        ValueError: the packs are not those of the driver, or a checkpoint is of another run.
        NotFiniteError: loss or gradient.
        ExportError: the trained student cannot be written; a checkpoint of it was.
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
    """Whether restarted workers would end with the same error: everything but a lost worker, connection or file."""
    certain = (NotFiniteError, ExportError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
    return memory or isinstance(error, certain)


def read_failure(folder: Path) -> str:
    """What ended the training of `folder` for good, "" if nothing did."""
    path = folder / CHECKPOINTS / FAILED
    return str(json.loads(path.read_text())["error"]) if path.is_file() else ""


def _train(job: TrainJob) -> None:
    prepare_process(job.config)
    store = PackStore(job.files)
    if store.digest != job.digest:
        raise ValueError(f"train: packs have digest {store.digest}, the driver read {job.digest}; pack again")
    folder = Path(job.folder)
    checkpoint, notes = newest_good(folder / CHECKPOINTS, job.spec)
    start = checkpoint.step if checkpoint else 0
    if checkpoint and checkpoint.spec.world_size != dist.get_world_size():
        notes.append(
            f"went on at step {start} with {dist.get_world_size()} workers, after {checkpoint.spec.world_size} before"
        )
    with loaded(job, checkpoint) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        saved, finished, history = _steps(job, engine, trainer, start)
        if finished < trainer.total_steps:
            notes.append(f"stopped after {finished} of {trainer.total_steps} steps: no lower validation loss since")
        best = _best_checkpoint(job, history, finished, notes)
        if best is None:
            _finish(job, engine, store, notes, finished if saved < finished else 0)
    if best is not None:
        with loaded(job, best) as (engine, _):
            _finish(job, engine, store, notes)


def _steps(job: TrainJob, engine: Any, trainer: Trainer, start: int) -> tuple[int, int, History]:
    """Train from `start` on; steps in the last checkpoint, finished steps, and the losses on what is kept out."""
    folder, config, total = Path(job.folder), job.config, trainer.total_steps
    history = history_of(read_metrics(folder / METRICS), config.patience, start)
    evaluate_every, save_every = config.evaluate_every_steps, config.checkpoint_every_steps
    saved = finished = start
    dist.barrier()  # every worker has read the metrics before rank 0 shortens them
    with metrics_file(folder, start, job.began) as metrics:
        while finished < total and not history.is_over:
            measured = trainer.step(finished)
            finished += 1
            if evaluate_every and (finished % evaluate_every == 0 or finished == total):
                losses = trainer.evaluate()
                measured = replace(measured, **losses)
                if history.add(finished, losses["validation_loss"]):
                    save_checkpoint(engine, folder / CHECKPOINTS / BEST, finished, job.spec, keep=1)
            metrics.record(measured, total)
            if save_every and finished % save_every == 0:
                save_checkpoint(engine, folder / CHECKPOINTS, finished, job.spec)
                saved = finished
    return saved, finished, history


def _best_checkpoint(job: TrainJob, history: History, finished: int, notes: list[str]) -> Checkpoint | None:
    """What is to be exported instead of the last weights; None if they are the best, or nothing says which are."""
    if history.best is None:
        return None
    best = history.best
    text = f"exported the weights of step {best.step} of {finished}, with the lowest validation loss {best.loss:.4f}"
    if best.step == finished:
        notes.append(text)
        return None
    found, problems = newest_good(Path(job.folder) / CHECKPOINTS / BEST, job.spec)
    if found is None or found.step != best.step:
        notes += [*problems, f"train: the best weights, of step {best.step}, are gone; exported the last instead"]
        return None
    notes.append(text)
    return found


def _finish(job: TrainJob, engine: Any, store: PackStore, notes: list[str], unsaved: int = 0) -> None:
    """Export the student and say so; `unsaved` steps are saved first where that fails."""
    folder = Path(job.folder)
    try:
        changed = export_student(engine, job.student, folder, job.config.lora)
    except ExportError:
        if unsaved:  # a finished training is not lost: the next attempt only exports
            save_checkpoint(engine, folder / CHECKPOINTS, unsaved, job.spec)
        raise
    notes += [f"generation config exported with {changed}"] if changed else []
    notes += hyper_attention_routes(engine.module, job.config, store.document_lengths)
    layers = count_hyper_layers(job.student, job.config)
    _write_summary(job, folder, attention_in_use(engine.module), layers, notes)


def _write_summary(job: TrainJob, folder: Path, attention: str, hyper_layers: int, notes: list[str]) -> None:
    """Rank 0 says that the student is complete; the driver turns this into the manifest."""
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if dist.get_rank() == 0:
        summary = {
            "identity": job.identity,
            "peak_rss_bytes": peaks,
            "backend": dist.get_backend(),
            "attention_implementation": attention,
            "hyper_attention_layers": hyper_layers,
            "notes": notes,
        }
        write_json(folder / CHECKPOINTS / EXPORTED, summary)
