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
from operators.select.ifd import Prepared, Score, ScoreConfig, StudentScorer, Turn
from operators.select.reward import RewardScorer
from operators.student.config import templated

# Increase this number when the code gives the same text another score. Version 1 did not separate bfloat16 on GPUs from
# float32 on CPUs, and found targets of one token too short.
METHOD = 2
ROWS_PER_PARTITION = 50_000
KNOWN = "known_scores"  # JSON list of records; a column only between the two steps here
TO_SCORE = "to_score"  # a temporary column like KNOWN: tokens, from tasks to actors
PREPARED_ROWS = 1_024  # tokenized by a task at a time
PREPARING_CPUS = 0.5
_IDS = pa.list_(pa.int32())
_TO_SCORE = pa.list_(
    pa.struct(
        [
            ("score_key", pa.string()),
            ("given", _IDS),
            ("alone", _IDS),
            ("num_scored", pa.int32()),
            ("reason", pa.string()),
        ]
    )
)
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
        chat_template: text that replaces the student's own template; "" keeps it.
    """

    student: str
    config: ScoreConfig
    folder: str
    reward_model: str = ""
    chat_template: str = ""


class Scores:
    """The scores of one batch of rows."""

    def __init__(self, known: dict[str, Score], config: ScoreConfig) -> None:
        self._known, self._config = known, config

    def of(self, turns: Sequence[tuple[str, Turn]]) -> list[Score]:
        """One score for each (row_id, turn)."""
        return [self._known[score_key(turn, self._config)] for _, turn in turns]


Asked = Callable[[dict[str, Any]], list[Turn]]
Decide = Callable[[pa.Table, Scores], pa.Table]


def map_with_scores(rows: Dataset, asked: Asked, decide: Decide, scorer: Scorer, kind: str) -> Dataset:
    """Pass every batch of rows, with its scores, to `decide`.

    Tasks on CPUs tokenize and decide. Between them, actors with the student only score.

    Args:
        rows: any data set with a unique `row_id`.
        asked: returns the turns of a row whose scores `decide` needs.
        decide: returns the new batch for a batch and its scores.
        scorer: the student.
        kind: names the folder of the scores within the ledger; one folder for each kind of scored text.
    """
    config, folder = scorer.config, f"{scorer.folder}/{kind}"
    judge, name = _judge(scorer, kind)
    prepare = partial(_prepare, asked=asked, scorer=judge, config=config)
    prepared = _with_known(rows, ParquetLog(folder), name).map_batches(
        prepare, batch_size=PREPARED_ROWS, batch_format="pyarrow", num_cpus=PREPARING_CPUS
    )
    scored = prepared.map_batches(
        _ScoringActor,
        fn_constructor_kwargs={"scorer": judge, "folder": f"{folder}/{name}"},
        batch_size=config.batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.actors),
        **config.resources(),
    )
    decide_batch = partial(_decide, decide=decide, config=config)
    return scored.map_batches(decide_batch, batch_size=None, batch_format="pyarrow", num_cpus=0.25)


def _judge(scorer: Scorer, kind: str) -> tuple[StudentScorer | RewardScorer, str]:
    """The model that gives scores of a kind, and the name under which the ledger keeps those of its revision."""
    if kind == REWARDS:
        return RewardScorer(scorer.reward_model, scorer.config), _name(model_revision(scorer.reward_model))
    student = StudentScorer(scorer.student, scorer.config, scorer.chat_template)
    return student, _name(templated(model_revision(scorer.student), scorer.chat_template))


def _name(revision: str) -> str:
    return hashlib.sha256(revision.encode()).hexdigest()[:16]


def score_key(turn: Turn, config: ScoreConfig) -> str:
    """Hash of everything but the student and its template that determines a score."""
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


def _prepare(rows: pa.Table, asked: Asked, scorer: StudentScorer | RewardScorer, config: ScoreConfig) -> pa.Table:
    """Add the column TO_SCORE: the turns of each row without a stored score, tokenized for the scorer's model."""
    wanted = [_unknown(row, asked, config) for row in rows.to_pylist()]
    prepared = iter(scorer.prepare([turn for turns in wanted for turn in turns.values()]))
    cells = [[{"score_key": key, **vars(next(prepared))} for key in turns] for turns in wanted]
    return rows.append_column(TO_SCORE, pa.array(cells, _TO_SCORE))


def _unknown(row: dict[str, Any], asked: Asked, config: ScoreConfig) -> dict[str, Turn]:
    known = {record["score_key"] for record in json.loads(row.pop(KNOWN) or "[]")}
    turns = {score_key(turn, config): turn for turn in asked(row)}
    return {key: turn for key, turn in turns.items() if key not in known}


class _ScoringActor:
    """Scores the turns in TO_SCORE, stores the scores and adds them to KNOWN."""

    def __init__(self, scorer: StudentScorer | RewardScorer, folder: str) -> None:
        self._scorer, self._folder = scorer, folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        cells = rows.select(["row_id", KNOWN, TO_SCORE]).to_pylist()
        turns = [(row["row_id"], turn.pop("score_key"), Prepared(**turn)) for row in cells for turn in row[TO_SCORE]]
        scores = self._scorer.score_prepared([turn for *_, turn in turns])
        new: dict[str, list[dict[str, Any]]] = {}
        for (row_id, key, _), score in zip(turns, scores, strict=True):
            new.setdefault(row_id, []).append({"row_id": row_id, "score_key": key, **vars(score)})
        if new:
            records = [record for each in new.values() for record in each]
            write_whole(self._folder, pa.Table.from_pylist(records, schema=RECORD))
        known = [json.dumps(json.loads(row[KNOWN] or "[]") + new.get(row["row_id"], [])) for row in cells]
        place = rows.column_names.index(KNOWN)
        return rows.set_column(place, KNOWN, pa.array(known, pa.string())).drop_columns([TO_SCORE])


def _decide(rows: pa.Table, decide: Decide, config: ScoreConfig) -> pa.Table:
    return decide(rows.drop_columns([KNOWN]), Scores(_read_known(rows), config))


def _read_known(rows: pa.Table) -> dict[str, Score]:
    records = [record for text in rows[KNOWN].drop_null().to_pylist() for record in json.loads(text)]
    names = ("nll_given", "nll_alone", "reason", "reward")
    return {each["score_key"]: Score(*(each.get(name) for name in names)) for each in records}
