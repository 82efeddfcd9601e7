"""Nothing that the student is evaluated on may be learnt: rows and rewrites that repeat an evaluation text are found.

A text is contaminated if more than `max_overlap` of its runs of `ngram_words` words occur in an evaluation text: a
row held out, in this refresh or another, or a record of the files that the configuration names.

The index is one sorted array of 64-bit hashes, 8 bytes an n-gram, built by tasks and shared by all workers of a node
through Ray's object store: 2 million held-out records of 50 words are 0.8 GB.
"""

import hashlib
import re
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from ray.data import Dataset

from operators.columns import ACTIVE, HELD_OUT
from operators.read.record_formats import Record, read_records
from operators.read.source_files import Piece, list_source_files, plan_pieces
from operators.stage import StageConfig, require_columns

CONTAMINATED = "dropped:contaminated"
TEXT_COLUMNS = ("instruction", "input")
HASH_BYTES = 8
RANGE_BYTES = 64 << 20

_WORDS = re.compile(r"\w+")
Hashes = npt.NDArray[np.uint64]


class DecontaminateConfig(StageConfig):
    """Configuration of `drop_contaminated` and of `filter_rewrites`, the section `decontaminate`."""

    held_out: bool = Field(True, description="rows held out for evaluation are evaluation texts")
    files: list[str] = Field(
        [],
        description="evaluation sets: .json, .jsonl, .parquet, or folders; known by name, so a new set needs a new one",
    )
    fields: list[str] = Field(
        ["instruction", "input", "question", "prompt", "problem", "query", "text"],
        description="of a record of these files, as far as it has them: its text",
    )
    ngram_words: int = Field(8, ge=1, description="length of a run of words")
    max_overlap: float = Field(0.5, ge=0, lt=1, description="share of a text's runs that may occur in an evaluation")


class EvaluationIndex:
    """The n-grams of all evaluation texts, wherever a worker asks for them."""

    def __init__(self, hashes: Any, ngram_words: int, max_overlap: float) -> None:
        """Share an index.

        Args:
            hashes: Ray's reference to a sorted uint64 array without repetition.
            ngram_words: as it was built.
            max_overlap: share of a text's n-grams from which it is contaminated, exclusive.
        """
        self._hashes, self._ngram_words, self._max_overlap = hashes, ngram_words, max_overlap

    def contaminates(self, texts: list[str]) -> list[bool]:
        """Whether each text repeats an evaluation text."""
        known: Hashes = ray.get(self._hashes)
        return [self._overlap(ngram_hashes(text, self._ngram_words), known) > self._max_overlap for text in texts]

    @staticmethod
    def _overlap(found: Hashes, known: Hashes) -> float:
        if not len(known) or not len(found):
            return 0.0
        places = np.minimum(np.searchsorted(known, found), len(known) - 1)
        return float((known[places] == found).mean())


def evaluation_index(rows: Dataset, others: Dataset | None, config: DecontaminateConfig) -> EvaluationIndex:
    """Build the index; runs `rows` and `others` once if rows held out are evaluation texts.

    Columns in:
        instruction, input, outcome.

    Raises:
        ValueError: a file of the configuration does not exist.
    """
    hashed = partial(_hash_rows, config=config)
    parts: list[Dataset] = []
    if config.held_out:
        texts = [each.select_columns([*TEXT_COLUMNS, "outcome"]) for each in (rows, others) if each is not None]
        parts += [each.map_batches(hashed, batch_format="pyarrow", num_cpus=0.25) for each in texts]
    pieces = [piece for path in config.files for piece in _pieces(path)]
    if pieces:
        tasks = ray.data.from_arrow([pa.Table.from_pylist([piece._asdict()]) for piece in pieces])
        read = partial(_hash_files, config=config)
        parts.append(tasks.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=0.5))
    found = [block for part in parts for block in part.to_arrow_refs()]
    merged = ray.remote(num_cpus=0.25)(_merge).remote(*found)
    return EvaluationIndex(merged, config.ngram_words, config.max_overlap)


def drop_contaminated(rows: Dataset, others: Dataset | None, config: DecontaminateConfig) -> Dataset:
    """Give active rows that repeat an evaluation text the outcome `dropped:contaminated`.

    Args:
        rows: columns.RAW; materialised or cheap, since it is read twice.
        others: columns.RAW of other refreshes, for their rows held out; or None.
        config: what an evaluation text is.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    Source:
        The overlap rule of arXiv 2411.15124, section 3.3 (8-grams, half of a text).
    """
    require_columns("drop_contaminated", [*TEXT_COLUMNS, "outcome"], rows.columns() or [])
    if not config.held_out and not config.files:
        return rows
    index = evaluation_index(rows, others, config)
    return rows.map_batches(partial(_end, index=index), batch_format="pyarrow", num_cpus=0.25)


def ngram_hashes(text: str, words: int) -> Hashes:
    """Hashes of the runs of so many words, in lower case and without punctuation; a shorter text is one run."""
    found = _WORDS.findall(text.casefold())
    if not found:
        return np.empty(0, np.uint64)
    runs = (" ".join(found[start : start + words]) for start in range(max(1, len(found) - words + 1)))
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=HASH_BYTES).digest() for run in runs)
    return np.frombuffer(digests, np.uint64)


def joined(rows: pa.Table, names: tuple[str, ...] = TEXT_COLUMNS) -> list[str]:
    """The text of each row that is compared: its columns, one after the other."""
    return [
        "\n".join(text or "" for text in texts) for texts in zip(*(rows[n].to_pylist() for n in names), strict=True)
    ]


def _end(rows: pa.Table, index: EvaluationIndex) -> pa.Table:
    active = pc.equal(rows["outcome"], ACTIVE)
    found = pc.and_(active, pa.array(index.contaminates(joined(rows)), pa.bool_()))
    outcome = pc.if_else(found, CONTAMINATED, rows["outcome"])
    return rows.set_column(rows.column_names.index("outcome"), "outcome", outcome)


def _hash_rows(rows: pa.Table, config: DecontaminateConfig) -> pa.Table:
    return _hashed(joined(rows.filter(pc.equal(rows["outcome"], HELD_OUT))), config)


def _hash_files(pieces: pa.Table, config: DecontaminateConfig) -> pa.Table:
    wanted = (*config.fields, "messages")
    records = (record for fields in pieces.to_pylist() for record in read_records(Piece(**fields), wanted))
    return _hashed([_text_of(record, config) for record in records], config)


def _text_of(record: Record, config: DecontaminateConfig) -> str:
    values: dict[str, object] = record.value if isinstance(record.value, dict) else {}
    texts = [values.get(name) for name in config.fields]
    turns = values.get("messages")
    for turn in turns if isinstance(turns, list) else []:
        texts += [turn.get("content")] if isinstance(turn, dict) and turn.get("role") == "user" else []
    return "\n".join(text for text in texts if isinstance(text, str))


def _hashed(texts: list[str], config: DecontaminateConfig) -> pa.Table:
    found = [ngram_hashes(text, config.ngram_words) for text in texts]
    return pa.table({"hash": np.unique(np.concatenate([np.empty(0, np.uint64), *found]))})


def _merge(*blocks: pa.Table) -> Hashes:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(block["hash"].to_numpy() for block in blocks)]))


def _pieces(path: str) -> list[Piece]:
    files = [file.path for file in list_source_files(path)]
    return [piece for task in plan_pieces(files, RANGE_BYTES) for piece in task]
