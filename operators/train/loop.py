"""What each training worker does: a plain DeepSpeed loop over the plan, with NEFTune as a hook.

The loss of a step is the sum of the cross entropy over its supervised tokens, divided by their number over all
workers; so the curve is the same for any number of workers, however many tokens each happens to hold.
"""

import ctypes
import json
import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from kernels.neftune import EmbeddingNoise, batch_of_pack, neftune
from operators.student.encode import load_tokenizer
from operators.student.packed_attention import attention_in_use
from operators.student.packed_loss import load_trainable, summed_loss
from operators.train.attention import configured_attention, count_hyper_layers, hyper_attention_routes
from operators.train.checkpoint import CheckpointSpec, restore, save_checkpoint, write_json
from operators.train.config import TrainConfig
from operators.train.export import ExportError, export_student
from operators.train.metrics import StepMetrics, metrics_file
from operators.train.pack_order import PackStore, dummy_pack, pack_order

_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES = -3, 1 << 20  # of glibc's malloc.h; bytes
CHECKPOINTS, EXPORTED, FAILED = "checkpoints", "exported.json", "failed.json"


@dataclass(frozen=True)
class TrainJob:
    """What a worker is told; the same for all workers."""

    config: TrainConfig
    student: str
    folder: str
    files: list[str]
    digest: str
    identity: str

    @property
    def spec(self) -> CheckpointSpec:
        """What its checkpoints are of."""
        return CheckpointSpec(self.identity, self.config.num_workers, self.config.sharding)


class NotFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number; a restart would give the same."""


class Trainer:
    """One worker's engine, packs and their order."""

    def __init__(self, job: TrainJob, engine: Any, noise: EmbeddingNoise, store: PackStore) -> None:
        self._job, self._engine, self._noise, self._store = job, engine, noise, store
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._order = pack_order(store.document_lengths, job.config)
        self._dummy = dummy_pack(load_tokenizer(job.student).eos_token_id or 0)
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
        return StepMetrics(
            step=step,
            epoch=self._order.epoch(step),
            loss=loss_sum / supervised,
            grad_norm=None if norm is None else float(norm),
            learning_rate=rate,
            tokens=self._store.tokens(packs),
            supervised_tokens=supervised,
            examples=self._store.examples(packs),
            neft_l2=l2_sum / documents if documents else None,
            seconds=time.monotonic() - started,
            pid=os.getpid(),
        )

    def _accumulate(self, step: int, supervised: int) -> tuple[float, float, float]:
        """Forward and backward passes of a step; all workers' sums of loss and noise norms, and their documents.

        The host waits for the device once, here, so that nothing is updated before the loss is known to be finite.
        """
        device = str(self._engine.device)
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        share = self._order.share(step, self._rank, self._world_size)
        for place, index in enumerate(share):
            pack = self._dummy if index is None else self._store.pack(index)
            last = place == len(share) - 1
            self._engine.set_gradient_accumulation_boundary(last)
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
    _prepare_process(job.config)
    store = PackStore(job.files)
    if store.digest != job.digest:
        raise ValueError(f"train: packs have digest {store.digest}, the driver read {job.digest}; pack again")
    folder = Path(job.folder)
    hyper_layers = count_hyper_layers(job.student, job.config)
    with _loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        start, problems = restore(engine, folder / CHECKPOINTS, job.spec)
        saved = start
        with metrics_file(folder, start) as metrics:
            for step in range(start, trainer.total_steps):
                measured = trainer.step(step)
                metrics.record(measured, trainer.total_steps)
                every = job.config.checkpoint_every_steps
                if every and (step + 1) % every == 0:
                    save_checkpoint(engine, folder / CHECKPOINTS, step + 1, job.spec)
                    saved = step + 1
        try:
            changed = export_student(engine, job.student, folder)
        except ExportError:
            if saved < trainer.total_steps:  # a finished training is not lost: the next attempt only exports
                save_checkpoint(engine, folder / CHECKPOINTS, trainer.total_steps, job.spec)
            raise
        notes = problems + ([f"generation config exported with {changed}"] if changed else [])
        notes += hyper_attention_routes(engine.module, job.config, store.document_lengths)
        _write_summary(job, folder, attention_in_use(engine.module), hyper_layers, notes)


def load_student(student: str, config: TrainConfig) -> Any:
    """The student ready for training, in fp32 or bf16, with exact attention.

    Raises:
        ValueError: its forward pass cannot leave out logits that no loss needs.
    """
    model = load_trainable(student, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def _loaded(job: TrainJob) -> Iterator[tuple[Any, EmbeddingNoise]]:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = job.config.deepspeed()
    # While this object lives, from_pretrained shards as it loads; without it every ZeRO-3 worker holds a full copy.
    sharding = HfDeepSpeedConfig(settings) if job.config.sharding == 3 else None
    model = load_student(job.student, job.config)
    config = job.config
    noise_on = neftune(model.get_input_embeddings(), config.neftune_alpha, config.seed, config.neftune_noise)
    with configured_attention(model, job.config), noise_on as noise:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        yield engine, noise
        engine.destroy()
    del sharding


def _prepare_process(config: TrainConfig) -> None:
    """Before DeepSpeed's first import: choose the device, compile nothing, be quiet."""
    if not config.gpus_per_worker:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _return_memory_when_freed()
    if config.threads_per_worker:
        torch.set_num_threads(config.threads_per_worker)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()
    # DeepSpeed would compile a shared-memory all-reduce wherever it finds a compiler; gloo needs none.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


def _return_memory_when_freed() -> None:
    """Map each block of a MiB or more by itself: in glibc's heap tensors leave holes, and workers grow by the step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


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
