"""Converts a checkpoint for another number of workers, to DeepSpeed's universal format.

Shards of one world size cannot be loaded into another. The conversion joins them to one file per weight, from which
each worker takes its part. It needs disk for one more copy, which is removed after loading.
Source: Universal Checkpointing (arXiv:2406.18820).
"""

import argparse
import contextlib
import io
import shutil
from pathlib import Path

import torch.distributed as dist

from operators.train.checkpoint import STATE, Checkpoint, gathered, leads, patient_group

_TAG = "universal"


def needs_conversion(checkpoint: Checkpoint | None, world_size: int, zero_stage: int) -> bool:
    """Whether another number of workers wrote it in shards; without ZeRO every worker has the whole state."""
    return checkpoint is not None and zero_stage > 0 and checkpoint.spec.world_size != world_size


def converted(checkpoint: Checkpoint) -> tuple[Path, str]:
    """Convert on one worker, into a folder next to the checkpoint; every worker must call this.

    Nodes that share no folder convert one each, and need the shards of all workers that wrote it.

    Returns:
        Folder and tag to load from.

    Raises:
        RuntimeError: a file could not be read or written; another attempt may succeed.
        ValueError: it cannot be converted, and another attempt would fail the same way.
    """
    target = _target(checkpoint)
    problem, passing = "", False
    with patient_group() as group:
        if leads(checkpoint.mates):
            shutil.rmtree(target, ignore_errors=True)  # left by a killed attempt
            try:
                _convert(checkpoint.folder / STATE, target / _TAG)
            except Exception as error:  # noqa: BLE001 - sent to all workers, who would wait for this one
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
                passing = isinstance(error, OSError)
                shutil.rmtree(target, ignore_errors=True)
        told = gathered((problem, passing), group)
    problem, passing = next((one for one in told if one[0]), ("", False))
    if problem:
        raise (RuntimeError if passing else ValueError)(
            f"train: checkpoint {checkpoint.folder} of {checkpoint.spec.world_size} workers cannot be converted for "
            f"{dist.get_world_size()}: {problem}; set train.num_workers to {checkpoint.spec.world_size}"
        )
    return target, _TAG


def remove_converted(checkpoint: Checkpoint) -> None:
    """Remove the converted copy after every worker has loaded it; every worker must call this."""
    dist.barrier()
    if leads(checkpoint.mates):
        shutil.rmtree(_target(checkpoint), ignore_errors=True)


def _target(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.with_name(f"{_TAG}-{checkpoint.folder.name}")


def _convert(state: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(state),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: each further one would import torch and hold a shard
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 do not write the state that only Megatron's models need
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
