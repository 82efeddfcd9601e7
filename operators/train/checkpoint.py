"""Training state on disk: sharded checkpoints that count only when they are complete. `saving` writes them.

A checkpoint is DeepSpeed's own folder, with one shard per worker, and a COMPLETE marker that is written last and holds
the digest of each file. Shards are pickles, so they are read only if this user wrote them and nobody changed them:
digest and owner are checked first, and if they differ, an older checkpoint is used. Released students are safetensors.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

_MARKER = "COMPLETE"
STATE = "state"


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
    """A complete checkpoint, written after `step` finished optimizer steps."""

    folder: Path
    step: int
    spec: CheckpointSpec


def write_marker(folder: Path, step: int, spec: CheckpointSpec, files: Mapping[str, tuple[int, str]]) -> None:
    """Mark a checkpoint as complete, after all else is written.

    Args:
        folder: of the checkpoint.
        step: optimizer steps finished.
        spec: what the checkpoint belongs to.
        files: name below the folder -> bytes and SHA-256.
    """
    sizes, digests = ({name: found[part] for name, found in sorted(files.items())} for part in (0, 1))
    write_json(folder / _MARKER, {"step": step, "spec": asdict(spec), "files": sizes, "digests": digests})


def complete_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints with a marker and all their files, oldest first; others are ignored."""
    found = []
    for marker in sorted(checkpoints.glob(f"step-*/{_MARKER}")):
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
    found = complete_checkpoints(checkpoints)
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


def newest_good(checkpoints: Path, spec: CheckpointSpec) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint; every worker must call this.

    Returns:
        The checkpoint, None if all are damaged, and what is wrong with newer ones.

    Raises:
        ValueError: as for `require_continuable`.
    """
    problems: list[str] = []
    if require_continuable(checkpoints, spec) is None:
        return None, problems
    for checkpoint in reversed(complete_checkpoints(checkpoints)):
        problem = damage(checkpoint)
        if not problem and replace(checkpoint.spec, world_size=spec.world_size) == spec:
            return checkpoint, problems
        problems.append(problem or f"train: checkpoint {checkpoint.folder} is of another run")
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
    marker = json.loads((checkpoint.folder / _MARKER).read_text())
    known = marker.get("digests", {})
    strange = [file.name for file in [*_files(checkpoint.folder), checkpoint.folder / _MARKER] if not _is_ours(file)]
    # Every worker must gather, also one that refuses a file, or the others would hang in the collective.
    found = _gathered({} if strange else _digests(checkpoint.folder))
    differing = sorted(name for name in marker["files"] if found.get(name) != known.get(name, ""))
    # All workers must decide the same: if only some of them load, they would hang in the collective.
    texts = _gathered({str(_rank()): f"{strange} {differing}" if strange or differing else ""})
    worst = next((text for text in texts.values() if text), "")
    if not worst:
        return ""
    what = "is not this user's alone" if strange else "is damaged"
    return f"train: checkpoint {checkpoint.folder} {what} ({(strange or differing or [worst])[0]}); it is not read"


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
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(_MARKER))


def _is_ours(file: Path) -> bool:
    """Whether this user (or root) owns the file, and not everybody may write to it."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & stat.S_IWOTH


def _digests(folder: Path) -> dict[str, str]:
    """Digests of this worker's part of the files; the work is shared, because a checkpoint is large."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    found = {}
    for file in list(_files(folder))[_rank() :: world_size]:
        with file.open("rb") as stream:
            found[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _gathered(part: dict[str, str]) -> dict[str, str]:
    """The union of every worker's part."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, part)
    return {name: value for each in parts for name, value in each.items()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
