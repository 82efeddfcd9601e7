"""Builds the DeepSpeed engine of one worker: prepares the process, loads the student, adds noise and attention."""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from kernels.neftune import EmbeddingNoise
from operators.student.packed_loss import load_trainable
from operators.train.attention import configured_attention
from operators.train.checkpoint import Checkpoint, load_checkpoint
from operators.train.compiled import compile_layers
from operators.train.config import TrainConfig
from operators.train.job import TrainJob
from operators.train.lora import with_adapters
from operators.train.memory import measure
from operators.train.noise import configured_noise
from operators.train.optimizer import own_optimizer
from operators.train.quantise import loading_options
from operators.train.resize import converted, needs_conversion, remove_converted
from operators.train.sequence_parallel import shared_packs

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _MAPPED_FROM_BYTES = 1 << 30, 32 << 20


def load_student(student: str, config: TrainConfig) -> Any:
    """The student ready for training, in fp32 or bf16, with exact attention.

    Raises:
        ValueError: its forward pass cannot leave out logits that no loss needs, or a package is missing.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_trainable(student, dtype, **loading_options(config, dtype))
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def loaded(job: TrainJob, checkpoint: Checkpoint | None = None) -> Iterator[tuple[Any, EmbeddingNoise]]:
    """The engine around the student, with adapters if they are configured, and the noise on its embedding.

    Args:
        job: what to train.
        checkpoint: where to continue, written by any number of workers; None starts from the student.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config, resized = job.config, needs_conversion(checkpoint, dist.get_world_size(), job.config.sharding)
    size = measure(job.student, config.lora)
    settings = config.deepspeed(dist.get_world_size(), size.adapters or size.parameters)
    settings |= {"checkpoint": {"load_universal": True}} if resized else {}
    # While this object exists, from_pretrained shards as it loads; otherwise each ZeRO-3 worker has a full copy.
    sharding = HfDeepSpeedConfig(settings) if config.sharding == 3 else None
    model = load_student(job.student, config)
    noise_on = configured_noise(model, config)
    with configured_attention(model, config), shared_packs(model, config.sequence_parallel), noise_on as noise:
        trained = with_adapters(model, config.lora, config.seed)
        if config.compile:
            compile_layers(model)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=trained, model_parameters=parameters, optimizer=own_optimizer(parameters, config), config=settings
        )
        if checkpoint is not None and resized:
            folder, tag = converted(checkpoint)
            load_checkpoint(engine, folder, tag)
            remove_converted(checkpoint)
        elif checkpoint is not None:
            load_checkpoint(engine, checkpoint.folder)
        yield engine, noise
        engine.destroy()
        _release(engine)
    del sharding


def _release(engine: Any) -> None:
    """Free weights, gradients and optimizer of a destroyed engine, perhaps for another one.

    DeepSpeed's `destroy` frees none of them, and under ZeRO-3 its objects refer to each other through torch, so that
    Python's collector never finds them.
    """
    for parameter in engine.module.parameters():
        vars(parameter).clear()
        parameter.grad, parameter.data = None, torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    engine.basic_optimizer.state.clear()
    engine.basic_optimizer.param_groups.clear()
    if engine.optimizer is not engine.basic_optimizer:
        vars(engine.optimizer).clear()


def prepare_process(config: TrainConfig) -> None:
    """Prepare the process before DeepSpeed's first import: choose the device, prevent compilation and log output."""
    if not config.gpus_per_worker:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _keep_freed_memory()
    if config.threads_per_worker:
        torch.set_num_threads(config.threads_per_worker)
    with _hidden("mlflow"):  # DeepSpeed would import it for its autotuner: 2.5 s of CPU in each worker
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()
    # DeepSpeed would compile a shared-memory all-reduce wherever it finds a compiler; gloo needs none.
    deepspeed.ops.__compatible_ops__ = {}
    if not config.gpus_per_worker:
        # ZeRO imports Muon, whose decorators would import torch's whole compiler: a second of CPU in each worker.
        compiler = deepspeed.runtime.compiler
        compiler.compile = lambda: compiler.dummy_decorator
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let imports find that the package is not installed, unless it is in use already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # how Python marks a module that must not be imported
    try:
        yield
    finally:
        del sys.modules[package]


def _keep_freed_memory() -> None:
    """Keep memory that a step frees for the next one: a returned page costs a page fault and zeroing when needed again.

    Larger blocks, such as logits, are still mapped separately, so that they leave no large holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
