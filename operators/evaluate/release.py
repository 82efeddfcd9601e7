"""Decides whether a new student takes the place of the released one, and moves the pointer to it in one step.

Readers of the pointer file see the old student or the new one, never half a file: locally the file is written aside
and renamed over the old one, and on an object store a PUT is atomic.
"""

import datetime
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs
from pydantic import Field

from operators.stage import StageConfig


class ReleaseConfig(StageConfig):
    """How much worse a new student may be, and how clearly it has to win."""

    max_loss_increase: float = Field(
        0.0, description="held-out loss that the new student may lose against the released one, nats per token"
    )
    min_win_margin: float = Field(
        0.0, ge=-1, le=1, description="smallest (wins - losses) / pairs against the base model; -1 asks for nothing"
    )


def release(evaluation: dict[str, Any], version: str, released_path: str, config: ReleaseConfig) -> dict[str, Any]:
    """Point `released_path` at a new student unless it is worse than the one that is released.

    The held-out set grows with every refresh, so a recorded loss is compared by its distance from the base model's
    loss on the same set; while the set stays the same, that is the recorded loss itself. Without a released student
    the base model is the measure. A second call for a released version changes nothing.

    Args:
        evaluation: from `evaluate`; `held_out_loss` and `judge` are read.
        version: the new student's folder name under students/.
        released_path: path or pyarrow URI of the pointer file.
        config: the margins.

    Returns:
        released: bool; version; previous: the version released before, or None; reasons: what was compared, in words.

    Raises:
        ValueError: the pointer file is there but cannot be read.
    """
    current = read_release(released_path)
    if current and current["version"] == version:
        return _answer(True, version, current.get("previous"), [f"{version} is released already"])
    previous = current["version"] if current else None
    checks = [_check_loss(evaluation["held_out_loss"], current, config), _check_wins(evaluation.get("judge"), config)]
    passed = all(good for good, _ in checks)
    if passed:
        record = {
            "version": version,
            "previous": previous,
            "released_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "held_out_loss": evaluation["held_out_loss"],
            "win_margin": (evaluation.get("judge") or {}).get("win_margin"),
        }
        _write_whole(released_path, json.dumps(record, indent=2, allow_nan=False).encode())
    return _answer(passed, version, previous, [reason for _, reason in checks])


def read_release(released_path: str) -> dict[str, Any] | None:
    """The record in the pointer file; None if nothing was ever released.

    Raises:
        ValueError: the file holds no release record.
    """
    filesystem, path = _open(released_path)
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return None
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if not _is_record(record):
        raise ValueError(f"release: {released_path} holds no release record; restore or remove it")
    found: dict[str, Any] = record
    return found


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("version"), str):
        return False
    loss = record.get("held_out_loss")
    return isinstance(loss, dict) and _is_loss(loss.get("base")) and _is_loss(loss.get("student"))


def _check_loss(loss: dict[str, Any], current: dict[str, Any] | None, config: ReleaseConfig) -> tuple[bool, str]:
    base, student = loss["base"], loss["student"]
    if not _is_loss(base) or not _is_loss(student):
        return False, "held-out loss: there is none to compare"
    against, limit = "the base model", base
    if current:
        recorded = current["held_out_loss"]
        against, limit = f"released {current['version']}", recorded["student"] + (base - recorded["base"])
    good = student <= limit + config.max_loss_increase
    return good, (
        f"held-out loss {student:.4f} against {limit:.4f} of {against}: "
        f"{'not worse' if good else 'worse'} (release.max_loss_increase={config.max_loss_increase})"
    )


def _check_wins(judge: dict[str, Any] | None, config: ReleaseConfig) -> tuple[bool, str]:
    if judge is None:
        return True, "answers were not judged"
    if not judge["num_pairs"]:
        good = config.min_win_margin <= -1
        return good, f"judged wins: none of {judge['unparsed']} verdicts could be read"
    good = judge["win_margin"] >= config.min_win_margin
    return good, (
        f"judged {judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses against the base model: "
        f"margin {judge['win_margin']:+.3f} {'meets' if good else 'misses'} "
        f"release.min_win_margin={config.min_win_margin}"
    )


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _answer(released: bool, version: str, previous: str | None, reasons: list[str]) -> dict[str, Any]:
    return {"released": released, "version": version, "previous": previous, "reasons": reasons}


def _open(path: str) -> tuple[fs.FileSystem, str]:
    if "://" in path:
        filesystem, inner = fs.FileSystem.from_uri(path)
        return filesystem, inner
    return fs.LocalFileSystem(), str(Path(path).absolute())


def _write_whole(path: str, content: bytes) -> None:
    filesystem, inner = _open(path)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(content)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(target)
