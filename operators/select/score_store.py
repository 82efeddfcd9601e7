"""The score ledger: stores the scores of a student, so that it scores no text twice.

It has one Parquet row per text under `<folder>/<student>/`, where a hash of weights and tokenizer names the student:
the scores of one student are valid for this student only. After a changed policy, after a crash and with new rows, only
texts without a stored score are scored; if there are none, no student is loaded. Texts that cannot be scored are stored
with their reason.

Cost: one shuffle of rows and stored scores by `row_id`, none if the ledger is empty. A batch of scores is stored before
its rows are passed on. Where the student ran is not part of the key.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from operators.join import cogroup
from operators.models import model_revision
from operators.parquet_log import ParquetLog, write_whole
from operators.select.ifd import Score, ScoreConfig, StudentScorer, Turn
from operators.select.reward import RewardScorer

# Increase this number when the code gives the same text another score. Version 1 did not separate bfloat16 on GPUs from
# float32 on CPUs, and found targets of one token too short.
METHOD = 2
ROWS_PER_PARTITION = 50_000
KNOWN = "known_scores"  # JSON list of records; a column used only inside this module
RECORD = pa.schema(
    [
        ("row_id", pa.string()),
        ("score_key", pa.string()),
        ("nll_given", pa.float64()),
        ("nll_alone", pa.float64()),
        ("reason", pa.string()),
        ("reward", pa.float64()),
    ]
)
REWARDS = "reward"  # the kind of scores that a reward model gives


@dataclass(frozen=True)
class Scorer:
    """The models that score, and where the scores are kept.

    Attributes:
        student: folder or hub id of the student before training.
        config: size, resources and limits of its pool.
        folder: of the score ledger, an absolute path or a URI; it need not exist. All policies share it.
        reward_model: folder or hub id of the model that gives REWARDS; "" if none does.
    """

    student: str
    config: ScoreConfig
    folder: str
    reward_model: str = ""


class Scores:
    """The scores of one batch of rows: stored ones, and a student that computes the others when they are asked for."""

    def __init__(self, known: dict[str, Score], scorer: StudentScorer | RewardScorer, config: ScoreConfig) -> None:
        self._known, self._scorer, self._config = known, scorer, config
        self.new: list[dict[str, Any]] = []  # records of texts that had to be scored

    def of(self, turns: Sequence[tuple[str, Turn]]) -> list[Score]:
        """One score for each (row_id, turn)."""
        keys = [score_key(turn, self._config) for _, turn in turns]
        asked = {key: each for key, each in zip(keys, turns, strict=True) if key not in self._known}
        made = self._scorer.score([turn for _, turn in asked.values()])
        for (key, (row_id, _)), score in zip(asked.items(), made, strict=True):
            self._known[key] = score
            self.new.append({"row_id": row_id, "score_key": key, **vars(score)})
        return [self._known[key] for key in keys]


Decide = Callable[[pa.Table, Scores], pa.Table]


def map_with_scores(rows: Dataset, decide: Decide, scorer: Scorer, kind: str) -> Dataset:
    """Call `decide` with every batch of rows and its scores, in a pool of actors that hold the student.

    Args:
        rows: any data set with a unique `row_id`.
        decide: takes a batch and its scores, and returns the batch that replaces it.
        scorer: the student.
        kind: names the folder of the scores within the ledger; one folder for each kind of scored text.
    """
    model = scorer.reward_model if kind == REWARDS else scorer.student
    config, folder = scorer.config, f"{scorer.folder}/{kind}"
    name = hashlib.sha256(model_revision(model).encode()).hexdigest()[:16]
    judge = (RewardScorer if kind == REWARDS else StudentScorer)(model, config)
    return _with_known(rows, ParquetLog(folder), name).map_batches(
        _ScoringActor,
        fn_constructor_kwargs={"decide": decide, "scorer": judge, "config": config, "folder": f"{folder}/{name}"},
        batch_size=config.batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.actors),
        **config.resources(),
    )


def score_key(turn: Turn, config: ScoreConfig) -> str:
    """Hash of everything but the student that determines a score."""
    return hashlib.sha256(json.dumps([METHOD, config.precision, config.max_tokens, *turn]).encode()).hexdigest()


def _with_known(rows: Dataset, files: ParquetLog, name: str) -> Dataset:
    """The rows with a column KNOWN: their stored scores, or null."""
    files.tidy(name)
    if not files.of(name):
        return rows.map_batches(partial(_add_null, name=KNOWN), batch_format="pyarrow", num_cpus=0.25)
    rows = rows.materialize()  # counted, and then shuffled
    num_rows = rows.count()
    records, num_records = files.read_for(rows.select_columns(["row_id"]), num_rows, name, RECORD.names)
    num_blocks = 1 + (num_rows + num_records) // ROWS_PER_PARTITION
    sides = (rows, rows.schema().base_schema), (records, RECORD)
    # Complete the shuffle now: once the actors run, its tasks may wait forever for a free CPU.
    complete: Dataset = cogroup(*sides, "row_id", num_blocks, _merge).materialize()
    return complete


def _add_null(rows: pa.Table, name: str) -> pa.Table:
    return rows.append_column(name, pa.nulls(rows.num_rows, pa.string()))


def _merge(rows: pa.Table, records: pa.Table) -> pa.Table:
    """Within one partition: give every row its records; records without a row are dropped."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records.to_pylist():
        found.setdefault(record["row_id"], []).append(record)
    known = [json.dumps(found[row_id]) if row_id in found else None for row_id in rows["row_id"].to_pylist()]
    return rows.append_column(KNOWN, pa.array(known, pa.string()))


class _ScoringActor:
    def __init__(self, decide: Decide, scorer: StudentScorer | RewardScorer, config: ScoreConfig, folder: str) -> None:
        self._decide, self._folder, self._config, self._scorer = decide, folder, config, scorer

    def __call__(self, rows: pa.Table) -> pa.Table:
        scores = Scores(_read_known(rows), self._scorer, self._config)
        decided = self._decide(rows.drop_columns([KNOWN]), scores)
        if scores.new:
            write_whole(self._folder, pa.Table.from_pylist(scores.new, schema=RECORD))
        return decided


def _read_known(rows: pa.Table) -> dict[str, Score]:
    records = [record for text in rows[KNOWN].drop_null().to_pylist() for record in json.loads(text)]
    names = ("nll_given", "nll_alone", "reason", "reward")
    return {each["score_key"]: Score(*(each.get(name) for name in names)) for each in records}
