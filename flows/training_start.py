"""The rows that a training learns from and the weights that it starts from, depending on the storage."""

import json
from typing import NamedTuple

from ray.data import Dataset

from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.retention import STUDENTS, has_weights
from flows.run import Run
from flows.student_files import require_undamaged
from operators.columns import RECYCLED_OUTCOMES
from operators.evaluate.release_history import ReleaseHistory
from operators.files.atomic import put_file
from operators.files.copies import read_text
from operators.read.drop_contaminated import drop_contaminated, evaluation_index
from operators.read.drop_seen import drop_seen
from operators.read.read_instructions import read_instructions
from operators.read.source_files import list_source_files
from operators.student.config import template_digest
from operators.train.mixture import COLUMNS, MixtureConfig, count_outcomes, general_rows, replayed
from operators.train.result import MANIFEST, TrainResult

START = "start.json"  # in a student's folder: the model that its training started from, and its base model
GENERAL_OUTCOMES = "general_outcomes"  # a metric of packed_sequences: outcome -> records of general data


class Start(NamedTuple):
    """The model that a training starts from, and why it is not the released student that was asked for, or ""."""

    student: str
    note: str = ""


def rows_to_pack(run: Run, recycled: Dataset, counted: dict[str, int]) -> Dataset:
    """Mix the rows to train on as `pack.mixture` says: all newest ones, a sample of earlier ones, and general data.

    Columns in: RECYCLED, of all refreshes. Columns out: RECYCLED without a mixture, else mixture.COLUMNS.

    Args:
        run: the configuration and its storage.
        recycled: returned unchanged if no mixture is configured.
        counted: gets the number of records of general data by outcome.
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
    general = general_data(run)
    counted.update(count_outcomes(general))
    num_recycled = _num_recycled(run, newest) + round(config.earlier * _num_recycled(run, earlier))
    return rows.union(general_rows(general, config, num_recycled, newest[-1]))


def general_data(run: Run) -> Dataset:
    """The records of `pack.mixture.general`, one row each; those that the student must not learn have their reason.

    Left out are records that cannot be used, copies of each other, records that a refresh of the source has or holds
    out, and records that repeat an evaluation text (`decontaminate`). Near-duplicates are not looked for.

    Columns out:
        columns.RAW, in Ray's object store, because reading shuffles all rows.
    """
    general = run.config.pack.mixture.general
    source = run.config.source.model_copy(update={"path": general, "limit": None, "held_out_fraction": 0.0})
    files = [file.path for file in list_source_files(general)]
    rows: Dataset = read_instructions(source, files, run.special_tokens, stage="general_data").materialize()
    if not rows.count():  # a shuffle of no rows would lose the columns
        return rows
    known = run.store.rows(RAW_INSTRUCTIONS, run.store.refreshes(RAW_INSTRUCTIONS))
    rows = drop_seen(rows, known).materialize()
    index = evaluation_index(rows, known, run.config.decontaminate)
    marked: Dataset = drop_contaminated(rows, index).materialize()
    return marked


def starting_student(run: Run, folder: str) -> Start:
    """The model that the training in `folder` starts from: the base model or the released student (`train.start`).

    This is decided once per student, because another student may be released while a training is interrupted. A
    released student that was made from another base model, or with another chat template, is not used.

    Raises:
        StorageError: the released student's files are not what its training wrote.
    """
    if run.config.train.start == "base":
        return Start(run.student)
    noted = read_text(f"{folder}/{START}")
    if noted is None:
        base = run.student_revision
        start = _released(run, base)
        put_file(f"{folder}/{START}", json.dumps({"student": start.student, "base": base, "note": start.note}))
    else:
        kept = json.loads(noted)
        start = Start(str(kept["student"]), str(kept.get("note", "")))
    if start.student != run.student:
        require_undamaged(start.student)
    return start


def _released(run: Run, base: str) -> Start:
    """The released student, or the base model of this revision and why the released student cannot be used."""
    current = ReleaseHistory(run.config.storage).current()
    if current is None:
        why = "no student is released yet"
    elif not has_weights(run.config.storage, current.version):
        why = f"the weights of the released student {current.version} are deleted"
    elif _base_of(run, run.path(STUDENTS, current.version)) != base:
        why = f"the released student {current.version} was made from another base model or chat template"
    else:
        return Start(run.path(STUDENTS, current.version))
    return Start(run.student, f"train.start: released, but {why}; training started from the base model")


def _base_of(run: Run, folder: str) -> str:
    """Revision of the base model and template that a student was made from; "" if it is unknown."""
    noted, manifest = read_text(f"{folder}/{START}"), read_text(f"{folder}/{MANIFEST}")
    if noted is not None:
        return str(json.loads(noted)["base"])
    made = None if manifest is None else TrainResult.model_validate_json(manifest)
    own = template_digest(run.config.student.template)
    return run.student_revision if made and (made.student, made.chat_template) == (run.student, own) else ""


def _num_recycled(run: Run, refreshes: list[str]) -> int:
    manifests = [run.store.manifest(RECYCLED_INSTRUCTIONS, key) for key in refreshes]
    return sum(made.outcomes.get(outcome, 0) for made in manifests if made for outcome in RECYCLED_OUTCOMES)
