"""Training state on disk: sharded checkpoints that count only when complete, and the finished student.

A checkpoint is DeepSpeed's own folder, one shard a worker, beside a COMPLETE marker that is written last. It is
read by this project only; what is released is safetensors.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from operators.student.encode import load_tokenizer

_MARKER = "COMPLETE"
_STATE = "state"
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint is of; it may only be continued under the same.

    Attributes:
        identity: hash of packs, student and everything in the configuration that changes the result.
        world_size: workers that wrote it, one shard each.
        zero_stage: how it is sharded.
    """

    identity: str
    world_size: int
    zero_stage: int


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` optimizer steps were finished when it was written."""

    folder: Path
    step: int
    spec: CheckpointSpec


def save_checkpoint(engine: Any, checkpoints: Path, step: int, spec: CheckpointSpec, keep: int = 2) -> None:
    """Write the engine's state after `step` finished steps; every worker must call it.

    Args:
        engine: the DeepSpeed engine.
        checkpoints: a folder that all workers share.
        step: optimizer steps finished.
        spec: what it is a checkpoint of.
        keep: older complete checkpoints beyond this number are removed.
    """
    folder = checkpoints / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
        folder.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=_STATE, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
        write_json(folder / _MARKER, {"step": step, "spec": asdict(spec), "files": sizes})
        for old in complete_checkpoints(checkpoints)[:-keep]:
            shutil.rmtree(old.folder)
    dist.barrier()


def complete_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints with a marker whose files are there in full, oldest first; others are as if absent."""
    found = []
    for marker in sorted(checkpoints.glob(f"step-*/{_MARKER}")):
        content = json.loads(marker.read_text())
        sizes = {str(file.relative_to(marker.parent)): file.stat().st_size for file in _files(marker.parent)}
        if sizes == content["files"]:
            found.append(Checkpoint(marker.parent, content["step"], CheckpointSpec(**content["spec"])))
    return found


def require_continuable(checkpoints: Path, spec: CheckpointSpec) -> Checkpoint | None:
    """The newest complete checkpoint, None if there is none.

    Raises:
        ValueError: it is of other packs, another configuration, world size or ZeRO stage. Shards of one world size
            are never loaded into another.
    """
    found = complete_checkpoints(checkpoints)
    if not found:
        return None
    newest = found[-1]
    for name, wanted in asdict(spec).items():
        written = getattr(newest.spec, name)
        if written != wanted:
            raise ValueError(
                f"train: checkpoint {newest.folder} was written with {name}={written}, this run has {wanted}; "
                f"run with {name}={written} again, or delete {checkpoints} to train from the start"
            )
    return newest


def load_checkpoint(engine: Any, checkpoint: Checkpoint) -> None:
    """Restore weights and optimizer; every worker must call it."""
    # The learning rate is a function of the step, so there is no scheduler to restore.
    path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=_STATE, load_lr_scheduler_states=False)
    if path is None:
        raise RuntimeError(f"train: DeepSpeed found no state in {checkpoint.folder}; delete it to use an older one")


def export_student(engine: Any, student: str, folder: Path) -> None:
    """Write the trained model as an ordinary Hugging Face folder; every worker must call it.

    Under ZeRO-3 one tensor at a time is gathered; rank 0 needs host memory for one whole copy of the model.

    Args:
        engine: the DeepSpeed engine.
        student: where tokenizer and chat template come from.
        folder: gets safetensors of at most 5 GB, config, generation config, tokenizer and chat template.
    """
    weights = gathered_weights(engine.module)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        load_tokenizer(student).save_pretrained(folder)
    dist.barrier()


def gathered_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the host of rank 0, an empty dict elsewhere; tied weights appear once."""
    import deepspeed

    first = dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if first:
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict()
        weights |= {name: buffer.cpu() for name, buffer in state.items() if name not in parameters}
    return weights


def write_json(path: Path, content: object) -> None:
    """Replace `path` in one step: a reader sees the old content or the new, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(_MARKER))
