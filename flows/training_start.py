"""The rows that a training learns from and the weights that it starts from, depending on the storage."""

import json

from ray.data import Dataset

from flows.graph import RECYCLED_INSTRUCTIONS
from flows.retention import STUDENTS, has_weights
from flows.run import Run
from operators.columns import RECYCLED_OUTCOMES
from operators.evaluate.release_history import ReleaseHistory
from operators.files.atomic import put_file
from operators.files.copies import read_text
from operators.models import model_revision
from operators.read.read_instructions import read_instructions
from operators.read.source_files import list_source_files
from operators.train.mixture import COLUMNS, MixtureConfig, general_rows, replayed
from operators.train.result import MANIFEST, TrainResult

START = "start.json"  # in a student's folder: the model that its training started from, and its base model


def rows_to_pack(run: Run, recycled: Dataset) -> Dataset:
    """Mix the rows to train on as `pack.mixture` says: all newest ones, a sample of earlier ones, and general data.

    Columns in: RECYCLED, of all refreshes. Columns out: RECYCLED without a mixture, else mixture.COLUMNS.

    Args:
        run: the configuration and its storage.
        recycled: returned unchanged if no mixture is configured.
    """
    config = run.config.pack.mixture
    if config == MixtureConfig():
        return recycled
    keys = run.store.refreshes(RECYCLED_INSTRUCTIONS)
    earlier, newest = keys[: -config.newest], keys[-config.newest :]
    rows = run.store.rows(RECYCLED_INSTRUCTIONS, newest).select_columns([*COLUMNS])
    if earlier:
        rows = rows.union(replayed(run.store.rows(RECYCLED_INSTRUCTIONS, earlier), config, newest[-1]))
    if not config.general:
        return rows
    source = run.config.source.model_copy(update={"path": config.general, "limit": None, "held_out_fraction": 0.0})
    files = [file.path for file in list_source_files(config.general)]
    raw = read_instructions(source, files, run.special_tokens, stage="general_data")
    raw = raw.materialize()  # counted, then read: reading shuffles all rows, and the object store spills to disk
    num_recycled = _num_recycled(run, newest) + round(config.earlier * _num_recycled(run, earlier))
    return rows.union(general_rows(raw, config, num_recycled, newest[-1]))


def starting_student(run: Run, folder: str) -> str:
    """The model that the training in `folder` starts from: the base model or the released student (`train.start`).

    This is decided once per student, because another student may be released while a training is interrupted. A
    released student that was made from another base model is not used.
    """
    if run.config.train.start == "base":
        return run.student
    noted = read_text(f"{folder}/{START}")
    if noted is not None:
        return str(json.loads(noted)["student"])
    current, base = ReleaseHistory(run.config.storage).current(), model_revision(run.student)
    released = run.path(STUDENTS, current.version) if current else ""
    usable = current is not None and has_weights(run.config.storage, current.version)
    start = released if usable and _base_of(run, released) == base else run.student
    put_file(f"{folder}/{START}", json.dumps({"student": start, "base": base}))
    return start


def _base_of(run: Run, folder: str) -> str:
    """Revision of the base model that a student was made from; "" if it is unknown."""
    noted, manifest = read_text(f"{folder}/{START}"), read_text(f"{folder}/{MANIFEST}")
    if noted is not None:
        return str(json.loads(noted)["base"])
    if manifest is not None and TrainResult.model_validate_json(manifest).student == run.student:
        return model_revision(run.student)
    return ""


def _num_recycled(run: Run, refreshes: list[str]) -> int:
    manifests = [run.store.manifest(RECYCLED_INSTRUCTIONS, key) for key in refreshes]
    return sum(made.outcomes.get(outcome, 0) for made in manifests if made for outcome in RECYCLED_OUTCOMES)
