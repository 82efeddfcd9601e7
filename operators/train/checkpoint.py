"""Training state on disk: sharded checkpoints that count only when they are complete. `saving` writes them.

A checkpoint is DeepSpeed's own folder, with one shard per worker, and a COMPLETE marker that is written last and holds
the digest of each file. Shards are pickles, so they are read only if this user wrote them and nobody changed them:
digest and owner are checked first, and if they differ, an older checkpoint is used. Released students are safetensors.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:  # it imports this module
    from operators.train.node_copy import NodeCopy

MARKER = "COMPLETE"
STATE = "state"
PATIENCE = timedelta(hours=12)  # to convert the 840 GB of a model of 70B takes hours


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint belongs to; only a training with the same identity and ZeRO stage may continue it.

    Attributes:
        identity: hash of packs, student and everything in the configuration that changes the result.
        world_size: number of workers that wrote it, one shard each.
        zero_stage: how it is sharded.
    """

    identity: str
    world_size: int
    zero_stage: int


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, written after `step` finished optimizer steps.

    Attributes:
        folder: where its files are.
        step: optimizer steps finished.
        spec: what it belongs to.
        mates: ranks of the workers that share the folder, in order; empty if all do.
    """

    folder: Path
    step: int
    spec: CheckpointSpec
    mates: tuple[int, ...] = ()


def marker_of(step: int, spec: CheckpointSpec, files: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """The content of the marker that is written after all else.

    Args:
        step: optimizer steps finished.
        spec: what the checkpoint belongs to.
        files: name below the folder -> bytes and SHA-256.
    """
    sizes, digests = ({name: found[part] for name, found in sorted(files.items())} for part in (0, 1))
    return {"step": step, "spec": asdict(spec), "files": sizes, "digests": digests}


def leads(mates: Sequence[int]) -> bool:
    """Whether this worker does what is done once for a folder; `mates` as in `Checkpoint`."""
    return rank() == (mates[0] if mates else 0)


def complete_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints with a marker and all their files, oldest first; others are ignored."""
    found = []
    for marker in sorted(checkpoints.glob(f"step-*/{MARKER}")):
        content = json.loads(marker.read_text())
        sizes = {str(file.relative_to(marker.parent)): file.stat().st_size for file in _files(marker.parent)}
        if sizes == content["files"]:
            found.append(Checkpoint(marker.parent, content["step"], CheckpointSpec(**content["spec"])))
    return found


def require_continuable(checkpoints: Path, spec: CheckpointSpec) -> Checkpoint | None:
    """The newest complete checkpoint, None if there is none; its content is checked only when it is loaded.

    Any number of workers may have written it.

    Raises:
        ValueError: it belongs to other packs, another configuration or ZeRO stage.
    """
    return _require_continuable(complete_checkpoints(checkpoints), checkpoints, spec)


def _require_continuable(found: list[Checkpoint], checkpoints: Path | str, spec: CheckpointSpec) -> Checkpoint | None:
    if not found:
        return None
    newest = found[-1]
    for name in ("identity", "zero_stage"):
        written, wanted = getattr(newest.spec, name), getattr(spec, name)
        if written != wanted:
            raise ValueError(
                f"train: checkpoint {newest.folder} was written with {name}={written}, this run has {wanted}; "
                f"run with {name}={written} again, or delete {checkpoints} to train from the start"
            )
    return newest


def newest_good(
    checkpoints: Path, spec: CheckpointSpec, copy: "NodeCopy | None" = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint; every worker must call this.

    Args:
        checkpoints: a folder of checkpoints.
        spec: what they must belong to.
        copy: if the folder is a copy of one in a bucket; then those in the bucket count, and files that the workers of
            this node need are fetched.

    Returns:
        The checkpoint, None if all are damaged, and what is wrong with newer ones.

    Raises:
        ValueError: as for `require_continuable`.
    """
    problems: list[str] = []
    found = copy.committed(checkpoints) if copy else complete_checkpoints(checkpoints)
    _require_continuable(found, copy.there(checkpoints) if copy else checkpoints, spec)
    for checkpoint in reversed(found):
        if replace(checkpoint.spec, world_size=spec.world_size) != spec:
            problems.append(f"train: checkpoint {checkpoint.folder} is of another run")
            continue
        if copy:
            copy.fetch(checkpoint)
        problem = damage(checkpoint)
        if not problem:
            return checkpoint, problems
        problems.append(problem)
    return None, problems


def given_checkpoint(folder: str, spec: CheckpointSpec) -> Checkpoint:
    """A checkpoint that the configuration names, of any packs and configuration; every worker must call this.

    Raises:
        ValueError: there is none, it is damaged, or it has another ZeRO stage.
    """
    found = named_checkpoint(folder, spec.zero_stage)
    problem = damage(found)
    if problem:
        raise ValueError(f"{problem}; give another as train.resume_from")
    return found


def named_checkpoint(folder: str, zero_stage: int) -> Checkpoint:
    """A checkpoint that the configuration names; its content is not checked.

    Raises:
        ValueError: there is none, or it has another ZeRO stage.
    """
    wanted = Path(folder).resolve()
    found = next((one for one in complete_checkpoints(wanted.parent) if one.folder == wanted), None)
    if found is None:
        raise ValueError(
            f"train: train.resume_from: {wanted} is not a complete checkpoint; give a folder step-<number>"
        )
    if found.spec.zero_stage != zero_stage:
        raise ValueError(
            f"train: train.resume_from: {wanted} was written with zero_stage={found.spec.zero_stage}, this run has "
            f"{zero_stage}; run with the same"
        )
    return found


def damage(checkpoint: Checkpoint) -> str:
    """What is wrong with a checkpoint, "" if nothing; each worker reads a part, and all get the same result."""
    folder, marker = checkpoint.folder, json.loads((checkpoint.folder / MARKER).read_text())
    mates = checkpoint.mates or range(world_size())
    strange = [file.name for file in [*_files(folder), folder / MARKER] if not _is_ours(file)]
    own = [] if strange else sorted(marker["files"])[mates.index(rank()) :: len(mates)]
    differing = [name for name in own if digest(folder / name) != marker.get("digests", {}).get(name)]
    what = "is not this user's alone" if strange else "is damaged"
    problem = f"{what} ({(strange or differing)[0]})" if strange or differing else ""
    # All workers must decide the same, and each must gather: otherwise those that load would wait for the others.
    worst = next(filter(None, gathered(problem)), "")
    return f"train: checkpoint {folder} {worst}; it is not read" if worst else ""


def load_checkpoint(engine: Any, folder: Path, tag: str = STATE) -> None:
    """Restore weights and optimizer; every worker must call this."""
    # The learning rate is a function of the step, so there is no scheduler to restore.
    all_there = all(parameter.requires_grad for parameter in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=all_there, load_lr_scheduler_states=False)
    if path is None:
        raise RuntimeError(f"train: DeepSpeed found no state in {folder}; delete it to use an older one")


def write_json(path: Path, content: object) -> None:
    """Replace the file `path` in one step: a reader sees the old or the new content, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(MARKER))


def _is_ours(file: Path) -> bool:
    """Whether this user (or root) owns the file, and not everybody may write to it."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & stat.S_IWOTH


def digest(file: Path) -> str:
    """SHA-256 of a file; "" if there is none."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def gathered(part: Any, group: Any = None) -> list[Any]:
    """What every worker gives, by rank; every worker must call this. `group` as from `patient_group`."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part, group=group)
    return parts


@contextmanager
def patient_group() -> Iterator[Any]:
    """A group in which workers wait up to twelve hours for one that works alone; every worker must enter it before.

    In the group of the training, NCCL would end them all after half an hour.
    """
    if world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def rank() -> int:
    """This worker's rank; 0 outside of a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of workers; 1 outside of a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
