"""What each training worker does: a plain DeepSpeed loop over the plan, with NEFTune as a hook.

The loss of a step is the sum of the cross entropy over its supervised tokens, divided by their number over all
workers; so the curve is the same for any number of workers, however many tokens each happens to hold.
"""

import ctypes
import inspect
import json
import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from kernels.neftune import EmbeddingNoise, batch_of_pack, neftune
from operators.progress import report_progress
from operators.student.encode import IGNORED, load_tokenizer
from operators.train.checkpoint import (
    CheckpointSpec,
    export_student,
    load_checkpoint,
    require_continuable,
    save_checkpoint,
    write_json,
)
from operators.train.config import TrainConfig
from operators.train.pack_order import Pack, PackOrder, PackStore, dummy_pack

_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES = -3, 1 << 20  # of glibc's malloc.h; bytes
METRICS, CHECKPOINTS, EXPORTED = "metrics.jsonl", "checkpoints", "exported.json"


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
        return CheckpointSpec(self.identity, self.config.num_workers, self.config.zero_stage)


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
    neft_l2: float | None
    seconds: float
    pid: int


class Trainer:
    """One worker's engine, packs and plan."""

    def __init__(self, job: TrainJob, engine: Any, noise: EmbeddingNoise, store: PackStore) -> None:
        self._job, self._engine, self._noise, self._store = job, engine, noise, store
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._plan = PackOrder(len(store), job.config.packs_per_step, job.config.seed)
        self._dummy = dummy_pack(load_tokenizer(job.student).eos_token_id or 0)
        self.total_steps = job.config.total_steps(self._plan.steps_per_epoch)

    def step(self, step: int) -> StepMetrics:
        """One optimizer step of all workers together.

        Raises:
            RuntimeError: the loss is not a finite number; nothing was updated.
        """
        started = time.monotonic()
        packs = self._plan.packs_of(step)
        supervised = self._store.supervised_tokens(packs)
        rate = self._job.config.learning_rate_at(step, self.total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        totals = torch.zeros(3, dtype=torch.float64)  # sum of the loss, sum of the noise's norms, documents
        for index in self._plan.share(step, self._rank, self._world_size):
            pack = self._dummy if index is None else self._store.pack(index)
            totals += self._micro_step(pack, self._plan.epoch(step), supervised)
        totals = totals.to(self._engine.device)
        dist.all_reduce(totals)
        loss_sum, l2_sum, documents = totals.tolist()
        if not math.isfinite(loss_sum):
            raise RuntimeError(f"train: loss at step {step} is {loss_sum}; lower train.learning_rate or use fp32")
        norm = self._engine.get_global_grad_norm()
        return StepMetrics(
            step=step,
            epoch=self._plan.epoch(step),
            loss=loss_sum / supervised,
            grad_norm=None if norm is None else float(norm),
            learning_rate=rate,
            tokens=self._store.tokens(packs),
            supervised_tokens=supervised,
            neft_l2=l2_sum / documents if documents else None,
            seconds=time.monotonic() - started,
            pid=os.getpid(),
        )

    def _micro_step(self, pack: Pack, epoch: int, supervised: int) -> Tensor:
        device = str(self._engine.device)
        lengths, uids = pack.document_lengths, pack.document_uids
        self._noise.set_batch(batch_of_pack(lengths, uids, len(pack.input_ids), epoch, device))
        loss_sum = summed_loss(self._engine, pack, device)
        # DeepSpeed averages gradients over the workers; times world size, the mean becomes the sum.
        self._engine.backward(loss_sum * (self._world_size / supervised), scale_wrt_gas=False)
        self._engine.step()
        l2 = self._noise.l2_per_document()
        return torch.tensor([loss_sum.item(), l2.sum().item(), len(l2)], dtype=torch.float64)


def summed_loss(model: Any, pack: Pack, device: str = "cpu") -> Tensor:
    """Sum of the cross entropy over the supervised tokens of a pack, in nats; fp32 scalar, 0 for a dummy.

    Only positions that predict a supervised token pass through the head. No attention mask is given: sdpa keeps
    documents apart by their position ids, which restart at 0.
    """
    input_ids = torch.tensor([pack.input_ids], device=device)
    positions = torch.cat([torch.arange(length) for length in pack.document_lengths or [len(pack.input_ids)]])
    targets = torch.tensor(pack.labels[1:], device=device)
    predicting = (targets != IGNORED).nonzero()[:, 0]
    if not len(predicting):
        predicting = torch.zeros(1, dtype=torch.long, device=device)
    logits = model(
        input_ids=input_ids, position_ids=positions[None].to(device), use_cache=False, logits_to_keep=predicting
    ).logits[0]
    return cross_entropy(logits.float(), targets[predicting], ignore_index=IGNORED, reduction="sum")


def train_worker(settings_of_run: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker: restore or start, train, export; rank 0 writes metrics and the summary.

    Raises:
        ValueError: the packs are not those of the driver, or a checkpoint is of another run.
        RuntimeError: the loss is not finite.
    """
    job = settings_of_run["job"]
    _prepare_process(job.config)
    store = PackStore(job.files)
    if store.digest != job.digest:
        raise ValueError(f"train: packs have digest {store.digest}, the driver read {job.digest}; pack again")
    folder = Path(job.folder)
    plan = PackOrder(len(store), job.config.packs_per_step, job.config.seed)
    settings = job.config.deepspeed(plan.micro_steps(dist.get_world_size()))
    with _loaded(job, settings) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        start = _restore(engine, job, folder)
        with _metrics_file(folder / METRICS, start) as metrics:
            for step in range(start, trainer.total_steps):
                measured = trainer.step(step)
                _record(measured, metrics, trainer.total_steps)
                every = job.config.checkpoint_every_steps
                if every and (step + 1) % every == 0:
                    save_checkpoint(engine, folder / CHECKPOINTS, step + 1, job.spec)
        export_student(engine, job.student, folder)
    _write_summary(job, folder)


def load_student(student: str, config: TrainConfig) -> Any:
    """The student ready for training, in fp32 or bf16, with exact attention.

    Raises:
        ValueError: its forward pass cannot leave out logits that no loss needs.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        student,
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
    )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"train: {type(model).__name__} of student {student} takes no logits_to_keep; use another")
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@contextmanager
def _loaded(job: TrainJob, settings: dict[str, object]) -> Iterator[tuple[Any, EmbeddingNoise]]:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # While this object lives, from_pretrained shards as it loads; without it every ZeRO-3 worker holds a full copy.
    sharding = HfDeepSpeedConfig(settings) if job.config.zero_stage == 3 else None
    model = load_student(job.student, job.config)
    noise_on = neftune(model.get_input_embeddings(), job.config.neftune_alpha, job.config.seed)
    with configured_attention(model, job.config), noise_on as noise:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        yield engine, noise
        engine.destroy()
    del sharding


def configured_attention(model: Any, config: TrainConfig) -> AbstractContextManager[object]:
    """Inside the context the model attends as the configuration says; documents of a pack stay apart either way."""
    if config.attention == "sdpa":
        return nullcontext()
    from kernels.hyper_attention.huggingface import patched_attention

    return patched_attention(model, config.hyper_attention_config(), config.hyper_attention_layers)


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


def _restore(engine: Any, job: TrainJob, folder: Path) -> int:
    """Load the newest complete checkpoint; the number of steps it had finished, 0 if there is none."""
    checkpoint = require_continuable(folder / CHECKPOINTS, job.spec)
    if checkpoint is None:
        return 0
    load_checkpoint(engine, checkpoint)
    return checkpoint.step


@contextmanager
def _metrics_file(path: Path, start: int) -> Iterator[TextIO | None]:
    """Rank 0's metrics, cut back to the steps before `start`: lines of lost steps are measured again."""
    if dist.get_rank() != 0:
        yield None
        return
    kept = [line for line in read_metrics(path) if line["step"] < start]
    shortened = path.with_name(f".{path.name}")
    shortened.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shortened.replace(path)
    with path.open("a") as file:
        yield file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed worker left half written is not one."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _record(measured: StepMetrics, metrics: TextIO | None, total_steps: int) -> None:
    if metrics is None:
        return
    metrics.write(json.dumps(asdict(measured)) + "\n")
    metrics.flush()
    report_progress("train", rows=1, tokens=measured.tokens, total=total_steps, note=f"loss {measured.loss:.3f}")


def _write_summary(job: TrainJob, folder: Path) -> None:
    """Rank 0 says that the student is complete; the driver turns this into the manifest."""
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if dist.get_rank() == 0:
        summary = {"identity": job.identity, "peak_rss_bytes": peaks, "backend": dist.get_backend()}
        write_json(folder / CHECKPOINTS / EXPORTED, summary)
