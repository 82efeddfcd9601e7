"""The releases of a storage: the models to compare a student with, and the commands `releases` and `rollback`.

recycle-and-train releases STORAGE [--html FILE]
recycle-and-train rollback STORAGE VERSION
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TextIO

from pyarrow import fs

from cluster.files import StorageError, explained
from cluster.lease import StorageBusyError, lease
from cluster.runtime import anchor
from cluster.storage import AssetStore
from flows.exit_codes import DONE, FAILED, UNUSABLE
from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS, STAGES
from flows.retention import STUDENTS, has_weights
from flows.run import Run
from flows.student_files import require_undamaged
from operators.columns import ACTIVE, HELD_OUT, RECYCLED_OUTCOMES
from operators.evaluate.config import TrainedAttention
from operators.evaluate.evaluate import Models, Rival
from operators.evaluate.release_history import Decision, ReleaseHistory
from operators.evaluate.results import BEST, RELEASED
from operators.files.atomic import open_filesystem, put_file
from operators.files.copies import read_text
from operators.report.history import RefreshLine, build_history
from operators.train.result import MANIFEST, TrainResult


def models_of(run: Run, version: str, folder: str) -> Models:
    """The models to compare: the student, its base model, the released student, and the best one so far."""
    train, storage = run.config.train, run.config.storage
    earlier = rivals(ReleaseHistory(storage), version)
    return Models(
        base=run.student,
        student=folder,
        rows=run.path("evaluations", f"{version}.parquet"),
        attention=TrainedAttention(train.attention, dict(train.hyper_attention), train.hyper_attention_layers),
        rivals=[_with_weights(run, rival) if has_weights(storage, rival.version) else rival for rival in earlier],
        tasks=run.path("evaluations", "tasks"),
        chat_template=run.config.student.template,
    )


def _with_weights(run: Run, rival: Rival) -> Rival:
    """An earlier student with its folder, and the attention with which it was trained, whatever is configured now."""
    folder = run.path(STUDENTS, rival.version)
    manifest = read_text(f"{folder}/{MANIFEST}")
    if manifest is None:
        return replace(rival, folder=folder)
    trained = TrainResult.model_validate_json(manifest).config
    sizes, layers = trained.get("hyper_attention", {}), trained.get("hyper_attention_layers", "all")
    return replace(rival, folder=folder, attention=TrainedAttention(trained.get("attention", "sdpa"), sizes, layers))


def rivals(history: ReleaseHistory, version: str) -> list[Rival]:
    """The released student and the best one so far, if the rows of their evaluations still exist."""
    decisions = {decision.version: decision for decision in history.decisions() if decision.event != "refused"}
    current, best = history.current(), history.best()
    wanted = [(current.version if current else "", RELEASED), (best.version if best else "", BEST)]
    return [
        Rival(name, role, history.rows_of(decisions[name]))
        for name, role in wanted
        if name != version and name in decisions and decisions[name].rows
    ]


def show_releases(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Print every decision of a storage, the oldest first, and mark the released student; returns 2 if it cannot."""
    parser = argparse.ArgumentParser(prog="recycle-and-train releases", description="List the releases of a storage.")
    parser.add_argument("storage", help="folder or URI of the runs' storage")
    parser.add_argument("--html", metavar="FILE", help="also write a page with loss, win rate, rows and cost over time")
    arguments = parser.parse_args(argv)
    try:
        storage = existing_storage(arguments.storage)
        history = ReleaseHistory(storage)
        current, decisions = history.current(), history.decisions()
        if arguments.html:
            put_file(arguments.html, build_history(storage, refresh_lines(AssetStore(storage)), decisions, current))
            out.write(f"page: {arguments.html}\n")
    except (ValueError, StorageError, OSError) as error:
        err.write(f"{error}\n")
        return UNUSABLE
    for decision in decisions:
        mark = "*" if current and decision.version == current.version and decision.event != "refused" else " "
        out.write(f"{mark} {_line(decision)}\n")
        out.writelines(f"      {reason}\n" for reason in decision.reasons)
    out.write(f"released: {current.version if current else 'nothing yet'}\n")
    return DONE


def roll_back(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Release an earlier student again; returns 0, 2 if it was never released, or 1 if a run holds the storage."""
    parser = argparse.ArgumentParser(prog="recycle-and-train rollback", description="Release an earlier student again.")
    parser.add_argument("storage", help="folder or URI of the runs' storage")
    parser.add_argument("version", help="as `recycle-and-train releases` lists it")
    arguments = parser.parse_args(argv)
    try:
        storage = existing_storage(arguments.storage)
        with lease(storage):
            decision = _roll_back(storage, arguments.version)
    except (StorageBusyError, StorageError) as error:
        err.write(f"{error}\n")
        return FAILED
    except ValueError as error:
        err.write(f"{error}\n")
        return UNUSABLE
    except OSError as error:
        err.write(f"{explained(error, storage) or error}\n")
        return FAILED
    out.write(
        f"released: {decision.version}, in place of {decision.previous}; the latter does not come back by itself\n"
    )
    return DONE


def _roll_back(storage: str, version: str) -> Decision:
    history = ReleaseHistory(storage)
    if any(decision.version == version for decision in history.decisions()) and not has_weights(storage, version):
        raise ValueError(
            f"rollback: {storage}/students/{version} is not there, or only partly, deleted by hand or by "
            "release.keep_students; train it again with the configuration that it was trained with"
        )
    require_undamaged(f"{storage}/{STUDENTS}/{version}")
    return history.roll_back(version)


def refresh_lines(store: AssetStore) -> list[RefreshLine]:
    """The numbers of each refresh, in the order in which they were first made."""
    lines = []
    for key in store.refreshes(RAW_INSTRUCTIONS):
        raw, recycled = store.manifest(RAW_INSTRUCTIONS, key), store.manifest(RECYCLED_INSTRUCTIONS, key)
        asking = [store.manifest(asset, key) for asset in STAGES]
        metrics = [made.metrics for made in asking if made is not None]
        before = raw.outcomes if raw is not None else {}
        after = recycled.outcomes if recycled is not None else {}
        lines.append(
            RefreshLine(
                key=key,
                read=(raw.rows or 0) if raw is not None else 0,
                new=before.get(ACTIVE, 0) + before.get(HELD_OUT, 0),
                recycled=sum(after.get(outcome, 0) for outcome in RECYCLED_OUTCOMES),
                held_out=before.get(HELD_OUT, 0),
                calls=int(_sum(metrics, "calls")),
                tokens=int(_sum(metrics, "prompt_tokens", "generated_tokens")),
                cost=_sum(metrics, "cost"),
            )
        )
    return lines


def _sum(metrics: Sequence[Mapping[str, Any]], *names: str) -> float:
    return float(sum(each.get(name, 0) for each in metrics for name in names))


def existing_storage(storage: str) -> str:
    """The absolute path or URI of an existing storage.

    Raises:
        ValueError: it does not exist, or its path cannot be used.
    """
    folder = anchor(storage)
    try:
        filesystem, inside = open_filesystem(folder)
        found = filesystem.get_file_info(inside).type
    except OSError as error:
        raise ValueError(explained(error, folder) or str(error)) from None
    if found != fs.FileType.Directory:
        raise ValueError(f"storage: {folder}: no such folder; a run creates it")
    return folder


def _line(decision: Decision) -> str:
    loss = decision.held_out_loss
    losses = f"held-out loss {loss.base:.4f} -> {loss.student:.4f}" if loss.base and loss.student else "no loss"
    wins = f", {decision.judge.wins} won {decision.judge.losses} lost" if decision.judge else ""
    on = f", held-out set {decision.held_out}" if decision.held_out else ""
    return f"{decision.number:>4}  {decision.at}  {decision.event:<11}  {decision.version}  {losses}{wins}{on}"
