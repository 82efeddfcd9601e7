"""Finds rows and rewrites that repeat an evaluation text: the student must not learn what it is evaluated on.

Evaluation texts are the held-out rows of all refreshes, and the records of the files that the configuration names. A
text is contaminated if more than `max_overlap` of its runs of `ngram_words` words occur in evaluation texts, or if it
contains more than `max_overlap` of the runs of one evaluation text (a question with words before and after it). A row
is judged by its instruction and input, and by each other turn of the user that has at least `ngram_words` words.

A run that occurs in more than `common_rows` rows of the source is not evidence: it belongs to a template, such as the
one instruction of a translation or classification data set, which held-out rows share with all others.

The index is a sorted array of 64-bit hashes, with the evaluation text of each and a mask of the common ones: 13 bytes
per run. Tasks build it, and all workers of a node share it through Ray's object store: 2 million held-out records of 50
words take 1.3 GB.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from ray.data import Dataset

from operators.columns import ACTIVE, HELD_OUT
from operators.ngrams import Hashes, run_hashes, words
from operators.read.dialogues import USER
from operators.read.evaluation_files import evaluation_texts, examine_evaluation_files
from operators.read.record_fields import NAMES, plain
from operators.read.record_formats import read_records
from operators.read.source_files import Piece, list_source_files, plan_pieces
from operators.stage import Finding, StageConfig, require_columns

CONTAMINATED = "dropped:contaminated"
TEXT_COLUMNS = ("instruction", "input")
TURN_COLUMNS = ("turns_before", "turns_after")
RANGE_BYTES = 64 << 20
COUNTED = (ACTIVE, HELD_OUT, CONTAMINATED)  # common runs are counted in rows of these outcomes, before and after

SOURCE_KEY = "read_instructions: source.path"  # in errors of `list_source_files`


class DecontaminateConfig(StageConfig):
    """Configuration of `drop_contaminated` and of `filter_rewrites`, the section `decontaminate`."""

    held_out: bool = Field(True, description="Whether the rows held out for evaluation are evaluation texts.")
    files: list[str] = Field(
        [],
        description="Files or folders of evaluation sets, in the formats of source.path; only their names are "
        "compared, so a changed set needs a new name.",
    )
    fields: list[str] = Field(
        [
            *("instruction", "input", "question", "prompt", "problem", "query", "text"),
            *("ctx", "inputs", "sentence", "goal"),  # HellaSwag, FLAN and BIG-bench, WinoGrande, PIQA
        ],
        description="The columns of these files that hold an evaluation text, a list of texts or a dialogue, of which "
        "the user's turns count; a file whose first records have no text in them is refused.",
    )
    ngram_words: int = Field(8, ge=1, description="The length of a run, in words.")
    max_overlap: float = Field(
        0.5, ge=0, lt=1, description="The share of a text's runs that may occur in evaluation texts."
    )
    common_rows: int = Field(
        5,
        ge=1,
        description="A run of words that occurs in more rows of the source than this belongs to a template and is not "
        "evidence of contamination.",
    )


class Runs(NamedTuple):
    """All runs of words of the evaluation texts.

    Attributes:
        hashes: uint64 [runs], sorted, without repetition.
        texts: int32 [runs], the number of one evaluation text that holds the run.
        common: bool [runs], whether it occurs in more than `common_rows` rows of the source.
        lengths: int32 [texts], how many runs of each text are not common.
    """

    hashes: Hashes
    texts: npt.NDArray[np.int32]
    common: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]


NO_RUNS = Runs(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.int32))


class EvaluationIndex:
    """The runs of words of all evaluation texts, for use in any worker."""

    def __init__(self, runs: Any, config: DecontaminateConfig) -> None:
        """Wrap an index: Ray's reference to `Runs`, and the configuration that it was built with."""
        self._runs, self._config = runs, config

    def contaminates(self, texts: list[str]) -> list[bool]:
        """Whether each text repeats an evaluation text."""
        runs: Runs = ray.get(self._runs)
        hashed = (run_hashes(text, self._config.ngram_words) for text in texts)
        return [overlap(found, runs) > self._config.max_overlap for found in hashed]

    @property
    def turn_words(self) -> int:
        """The least words of a turn that is judged."""
        return self._config.ngram_words

    def num_texts(self) -> int:
        """How many different evaluation texts there are."""
        runs: Runs = ray.get(self._runs)
        return len(runs.lengths)


def overlap(found: Hashes, runs: Runs) -> float:
    """The larger of two shares, both without common runs.

    The first is the share of the judged text's runs that occur in evaluation texts; the second is the largest share of
    one evaluation text's runs that occur in the judged text.

    Args:
        found: of the text that is judged, as of `run_hashes`.
        runs: of the evaluation texts.
    """
    places, is_known = _look_up(found, runs.hashes)
    matched = places[is_known]
    matched = matched[~runs.common[matched]]
    if not len(matched):
        return 0.0
    num_telling = len(found) - int(is_known.sum()) + len(matched)
    texts, counts = np.unique(runs.texts[np.unique(matched)], return_counts=True)
    return float(max(len(matched) / num_telling, (counts / runs.lengths[texts]).max()))


def evaluation_index(rows: Dataset, others: Dataset | None, config: DecontaminateConfig) -> EvaluationIndex:
    """Build the index; reads `rows` and `others` twice: for the held-out rows, and to count the rows that hold a run.

    Columns in:
        instruction, input, turns_before, turns_after, outcome.

    Raises:
        ValueError: a file of the configuration does not exist.
    """
    if not config.held_out and not config.files:
        return EvaluationIndex(ray.put(NO_RUNS), config)
    columns = [*TEXT_COLUMNS, *TURN_COLUMNS, "outcome"]
    texts = [each.select_columns(columns) for each in (rows, others) if each is not None]
    hashed = partial(_hash_rows, config=config)
    parts = [each.map_batches(hashed, batch_format="pyarrow", num_cpus=0.25) for each in texts if config.held_out]
    pieces = [piece for path in config.files for piece in _pieces(path)]
    if pieces:
        tasks = ray.data.from_arrow([pa.Table.from_pylist([piece._asdict()]) for piece in pieces])
        read = partial(_hash_files, config=config)
        parts.append(tasks.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=0.5))
    known = ray.remote(num_cpus=0.25)(_merge).remote(*(block for part in parts for block in part.to_arrow_refs()))
    count = partial(_count_rows, known=known, config=config)
    counted = [each.map_batches(count, batch_size=None, batch_format="pyarrow", num_cpus=0.25) for each in texts]
    blocks = [block for part in counted for block in part.to_arrow_refs()]
    return EvaluationIndex(ray.remote(num_cpus=0.25)(_leave_out).remote(known, config.common_rows, *blocks), config)


def examine_files(config: DecontaminateConfig) -> Iterator[Finding]:
    """Findings about evaluation files that would end the run later, or with which nothing would be compared."""
    yield from examine_evaluation_files(config.files, config.fields, config.ngram_words)


def drop_contaminated(rows: Dataset, index: EvaluationIndex) -> Dataset:
    """Give active rows that repeat an evaluation text the outcome `dropped:contaminated`.

    Args:
        rows: columns.RAW.
        index: of these rows, `evaluation_index`.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    Source:
        The overlap rule of arXiv 2411.15124, section 3.3 (8-grams, half of a text); leaving out common runs is ours.
        docs/decisions/0010 has recall and false positives on template data and planted leaks.
    """
    require_columns("drop_contaminated", [*TEXT_COLUMNS, *TURN_COLUMNS, "outcome"], rows.columns() or [])
    return rows.map_batches(partial(_end, index=index), batch_format="pyarrow", num_cpus=0.25)


def judged_texts(rows: pa.Table, turn_words: int) -> list[list[str]]:
    """The texts of each row that are judged: instruction and input, and each long turn of the user around them."""
    around = zip(*(rows[name].to_pylist() for name in TURN_COLUMNS), strict=True)
    return [
        [text, *(one for turns in each for one in _asked(turns) if len(words(one)) >= turn_words)]
        for text, each in zip(joined(rows), around, strict=True)
    ]


def _asked(turns: str | None) -> list[str]:
    return [turn["content"] for turn in json.loads(turns) if turn["role"] == USER] if turns else []


def joined(rows: pa.Table, names: tuple[str, ...] = TEXT_COLUMNS) -> list[str]:
    """The text of each row that is compared: its columns, joined."""
    return [
        "\n".join(text or "" for text in texts) for texts in zip(*(rows[n].to_pylist() for n in names), strict=True)
    ]


def _end(rows: pa.Table, index: EvaluationIndex) -> pa.Table:
    active = pc.equal(rows["outcome"], ACTIVE)
    texts = judged_texts(rows, index.turn_words)
    judged = iter(index.contaminates([text for each in texts for text in each]))
    repeats = [sum(next(judged) for _ in each) > 0 for each in texts]
    found = pc.and_(active, pa.array(repeats, pa.bool_()))
    outcome = pc.if_else(found, CONTAMINATED, rows["outcome"])
    return rows.set_column(rows.column_names.index("outcome"), "outcome", outcome)


def _hash_rows(rows: pa.Table, config: DecontaminateConfig) -> pa.Table:
    return _hashed(joined(rows.filter(pc.equal(rows["outcome"], HELD_OUT))), config)


def _hash_files(pieces: pa.Table, config: DecontaminateConfig) -> pa.Table:
    names = {plain(name) for name in (*config.fields, *NAMES["messages"])}
    read = (Piece(**fields) for fields in pieces.to_pylist())
    records = (record for piece in read for record in read_records(piece, lambda name: plain(name) in names))
    return _hashed(
        [text for one in records for text in evaluation_texts(one, config.fields, config.ngram_words)], config
    )


def _hashed(texts: list[str], config: DecontaminateConfig) -> pa.Table:
    """Columns out: `hash` of each run, and `text`, a number for the text that contains it."""
    found = [np.unique(run_hashes(text, config.ngram_words)) for text in texts]
    numbers = [np.full(len(hashes), hashes.sum(dtype=np.uint64)) for hashes in found]
    empty = np.empty(0, np.uint64)
    return pa.table({"hash": np.concatenate([empty, *found]), "text": np.concatenate([empty, *numbers])})


def _merge(*blocks: pa.Table) -> Runs:
    """All runs, before the common ones are marked."""
    blocks = tuple(block for block in blocks if block.num_rows)
    if not blocks:
        return NO_RUNS
    hashes, first = np.unique(np.concatenate([block["hash"].to_numpy() for block in blocks]), return_index=True)
    numbers = np.concatenate([block["text"].to_numpy() for block in blocks])[first]
    lengths, texts = np.unique(numbers, return_inverse=True)
    common = np.zeros(len(hashes), np.bool_)
    return Runs(hashes, texts.astype(np.int32), common, np.zeros(len(lengths), np.int32))


def _look_up(found: Hashes, known: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The position of each hash in the sorted array `known`, and whether it occurs there."""
    if not len(known):
        return np.zeros(len(found), np.int64), np.zeros(len(found), np.bool_)
    places = np.minimum(np.searchsorted(known, found), len(known) - 1)
    return places, known[places] == found


def _count_rows(rows: pa.Table, known: Any, config: DecontaminateConfig) -> pa.Table:
    """Columns out: `place` of a run in `known`, and `rows`, the number of rows of the block that contain it."""
    hashes = ray.get(known).hashes
    places = [np.empty(0, np.int64)]
    for texts in judged_texts(rows.filter(pc.is_in(rows["outcome"], pa.array(COUNTED))), config.ngram_words):
        hashed = [run_hashes(text, config.ngram_words) for text in texts]
        at, is_known = _look_up(np.concatenate(hashed), hashes)
        places.append(np.unique(at[is_known]))
    found, counts = np.unique(np.concatenate(places), return_counts=True)
    return pa.table({"place": found, "rows": counts})


def _leave_out(runs: Runs, common_rows: int, *blocks: pa.Table) -> Runs:
    """Mark the runs that occur in more than `common_rows` rows, and count the other runs of each text."""
    counts = np.zeros(len(runs.hashes), np.int64)
    for block in blocks:
        if block.num_rows:
            counts[block["place"].to_numpy()] += block["rows"].to_numpy()  # a block names each place once
    common = counts > common_rows
    lengths = np.bincount(runs.texts[~common], minlength=len(runs.lengths)).astype(np.int32)
    return runs._replace(common=common, lengths=lengths)


def _pieces(path: str) -> list[Piece]:
    try:
        files = [file.path for file in list_source_files(path)]
    except ValueError as error:
        raise ValueError(str(error).replace(SOURCE_KEY, "decontaminate.files")) from None
    return [piece for task in plan_pieces(files, RANGE_BYTES) for piece in task]
