"""Drops near-duplicates before the teacher is called for them: MinHash signatures, compared within LSH buckets.

Two records are near-duplicates if the Jaccard similarity of their shingles, runs of `shingle_words` words, is at least
`threshold`, in two sets of shingles: all of them, and those that tell the record from others. A shingle in more than
`common_rows` rows belongs to a template, such as the one instruction of a classification data set, and tells nothing.
Records without a telling shingle are near-duplicates only if all their words are the same.

Rows with different answers of few words are never near-duplicates, nor are dialogues with different turns or with
different last pairs. Of each group one row stays: a row of an earlier refresh if there is one, else the row of smallest
id. So the result depends neither on the order of files nor on the number of workers.

Cost: about 0.3 ms of CPU per row for the signatures, and one shuffle of `bands` (13 at the default threshold) small
records per row, 270 bytes each. A record carries the signatures' low bytes, so that the bucket can be compared without
a join. Memory: `common_runs` is bounded for any number of rows. A bucket of telling shingles has at most `common_rows`
rows where the counts are exact; of 10^8 rows, where 1 in 100 is counted, some hundreds. One task gets
`ROWS_PER_PARTITION` records, 60 MB.
"""

import json
import zlib
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field
from ray.data import Dataset

from operators.columns import ACTIVE, RAW
from operators.join import ROWS_PER_PARTITION, end_rows, group_by_key
from operators.ngrams import Hashes, run_hashes, words
from operators.read.common_runs import CommonRuns, common_runs, rows_with
from operators.stage import StageConfig, require_columns

NEAR_DUPLICATE = "dropped:near_duplicate"
SEED = 1  # of the permutations; a constant of the method, like the hash
LEADERS = 16  # most groups in one bucket; a row that belongs to none of them stays
LABEL_WORDS = 5  # an answer of at most so many words is a label or a figure: another one makes another record
# An answer of more than LONG_ANSWER_WORDS is evidence although ANSWER_FACTOR times `common_rows` rows have it, because
# templates seldom have such answers.
LONG_ANSWER_WORDS, ANSWER_FACTOR = 20, 4
NUM_PARTS = 3  # the whole record, the words of its question and those of its answer ...
PART_PERMUTATIONS = 32  # ... each with so many permutations, which estimate to about 0.07, so ...
PART_TOLERANCE = 0.1  # ... this much below the threshold passes

_EARLIER, _NEW = "0", "1"  # prefix of a row's id; the smallest stays
_PAIR, _TURNS = ("instruction", "input", "response"), ("turns_before", "turns_after")


class DeduplicateConfig(StageConfig):
    """Configuration of `drop_near_duplicates`, the section `deduplicate`."""

    near: bool = Field(True, description="Whether near-duplicates are dropped; exact duplicates always are.")
    threshold: float = Field(
        0.8, gt=0, le=1, description="The least Jaccard similarity of the shingles of two records that are duplicates."
    )
    shingle_words: int = Field(
        3,
        ge=1,
        description="The length of a shingle, in words; short ones find more duplicates, but also more false ones.",
    )
    num_permutations: int = Field(
        128, ge=16, le=1024, description="The permutations of a signature; more permutations, better estimate."
    )
    common_rows: int = Field(
        5,
        ge=1,
        description="A shingle that occurs in more rows than this belongs to a template: records that share only such "
        "shingles are no duplicates. A text that occurs in more versions than this keeps those of other words.",
    )


def drop_near_duplicates(rows: Dataset, earlier: Dataset | None, config: DeduplicateConfig) -> Dataset:
    """Give near-duplicates among the active rows the outcome `dropped:near_duplicate`.

    Args:
        rows: columns.RAW; read more than once, so it should be materialised or cheap to compute.
        earlier: columns.RAW of other refreshes, or None; their rows are never dropped here.
        config: which rows count as duplicates.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    Source:
        Broder 1997 (MinHash); Lee et al., arXiv 2107.06499, for what near-duplicates do to language models. Leaving
        out common shingles is ours; docs/decisions/0012 has recall and false positives on template data.
    """
    require_columns("drop_near_duplicates", RAW.names, rows.columns() or [])
    if not config.near:
        return rows
    sources = [rows] if earlier is None else [rows, earlier]
    num_rows = sum(each.count() for each in sources)
    common = common_runs(sources, num_rows, whole_texts, config.shingle_words, config.common_rows)
    banded = _banded(rows, _NEW, common, config)
    if earlier is not None:
        banded = banded.union(_banded(earlier, _EARLIER, common, config))
    num_bands = bands_and_rows(config.threshold, config.num_permutations)[0]
    buckets = group_by_key(banded, "band", 1 + num_rows * num_bands // ROWS_PER_PARTITION)
    copies = buckets.map_batches(
        partial(_copies, threshold=config.threshold), batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    return end_rows(rows, copies, NEAR_DUPLICATE, num_rows)


@lru_cache
def bands_and_rows(threshold: float, num_permutations: int) -> tuple[int, int]:
    """Number of bands of a signature, and of values in a band, so that pairs above the threshold share a bucket."""
    from datasketch import MinHashLSH  # here, because it imports scipy, which takes a second

    index = MinHashLSH(threshold=threshold, num_perm=num_permutations)
    return index.b, index.r


def whole_texts(rows: pa.Table) -> list[str]:
    """All words of each row: those of its pair, and those of the turns around it."""
    columns = [rows[name].to_pylist() for name in (*_PAIR, *_TURNS)]
    return ["\n".join((*each[:3], *(said(turns) for turns in each[3:]))) for each in zip(*columns, strict=True)]


def said(turns: str | None) -> str:
    """The contents of turns, a JSON list as in columns.RAW, one after the other."""
    return "\n".join(turn["content"] for turn in json.loads(turns)) if turns else ""


def label_of(response: str) -> str:
    """An answer of few words without case and spacing, its signs kept (-5 is not 5); "" for a longer answer."""
    found = response.casefold().split()
    return " ".join(found).rstrip(".") if len(found) <= LABEL_WORDS else ""


def telling_of(found: Hashes, text: str, answer: str, common: CommonRuns, config: DeduplicateConfig) -> Hashes:
    """The hashes of a record's shingles that tell it from others; if none does, one hash of all its words.

    Args:
        found: hashes of all its shingles.
        text: all its words.
        answer: its response if that is a long answer, else "".
        common: shingles of the source.
        config: of `drop_near_duplicates`.
    """
    telling = found[rows_with(found, common) <= config.common_rows]
    if answer:
        answered = run_hashes(answer, config.shingle_words)
        telling = np.concatenate([telling, answered[rows_with(answered, common) <= ANSWER_FACTOR * config.common_rows]])
    return telling if len(telling) or not len(found) else run_hashes(text, len(words(text)))


def _banded(rows: Dataset, owner: str, common: Any, config: DeduplicateConfig) -> Dataset:
    banded = partial(_bands, owner=owner, common=common, config=config)
    return rows.map_batches(banded, batch_size=4096, batch_format="pyarrow", num_cpus=0.5)


def _bands(rows: pa.Table, owner: str, common: Any, config: DeduplicateConfig) -> pa.Table:
    """One record for each active row and band: `band`, `owner`, `sketch`."""
    rows = rows.filter(pc.equal(rows["outcome"], ACTIVE))
    signatures, sketches = sketched(rows, ray.get(common), config)
    labels = [zlib.crc32(label_of(text or "").encode()).to_bytes(4) for text in rows["response"].to_pylist()]
    num_bands, width = bands_and_rows(config.threshold, config.num_permutations)
    owners = [owner + row_id for row_id in rows["row_id"].to_pylist()]
    bands = [
        number.to_bytes(2, "little") + label + signature[number * width : (number + 1) * width].tobytes()
        for number in range(num_bands)
        for label, signature in zip(labels, signatures, strict=True)
    ]
    columns = {"band": bands, "owner": owners * num_bands, "sketch": [one.tobytes() for one in sketches] * num_bands}
    return pa.table(columns, pa.schema([("band", pa.binary()), ("owner", pa.string()), ("sketch", pa.binary())]))


def sketched(rows: pa.Table, common: CommonRuns, config: DeduplicateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Signatures of the telling shingles, uint32 [rows, permutations], and sketches, uint8 [rows, sketch].

    A sketch has the low bytes of that signature, then those of the signatures of the whole row's shingles, of its
    question's words and of its answer's words. Two different values agree in the low byte 1 in 256 times (b-bit
    MinHash, Li & König 2010).
    """
    texts, answers = whole_texts(rows), [text or "" for text in rows["response"].to_pylist()]
    asked = ["\n".join(each) for each in zip(*(rows[name].to_pylist() for name in _PAIR[:2]), strict=True)]
    wholes = [run_hashes(text, config.shingle_words) for text in texts]
    of_asked, of_answers = ([run_hashes(text, 1) for text in column] for column in (asked, answers))
    telling = [
        telling_of(whole, text, answer if len(found) > LONG_ANSWER_WORDS else "", common, config)
        for whole, text, answer, found in zip(wholes, texts, answers, of_answers, strict=True)
    ]
    signatures = _signatures(telling, config.num_permutations)
    parts = [_signatures(one, PART_PERMUTATIONS) for one in (wholes, of_asked, of_answers)]
    return signatures, np.hstack([signatures, *parts]).astype(np.uint8)


def _signatures(hashed: list[Hashes], num_permutations: int) -> np.ndarray:
    """MinHash signatures of sets of hashes, uint32 [sets, permutations]; an empty set has that of {0}."""
    factors, offsets = _permutations(num_permutations)
    sets = ((hashes >> np.uint64(32)).astype(np.uint32) if len(hashes) else np.zeros(1, np.uint32) for hashes in hashed)
    each = [(one[:, None] * factors + offsets).min(axis=0) for one in sets]  # modulo 2^32; hashes of runs are random
    return np.array(each, np.uint32).reshape(len(hashed), num_permutations)


@lru_cache
def _permutations(number: int) -> tuple[np.ndarray, np.ndarray]:
    from datasketch import MinHash

    factors, offsets = MinHash(num_perm=number, seed=SEED).permutations
    return factors.astype(np.uint32), offsets.astype(np.uint32)


def _copies(block: pa.Table, threshold: float) -> pa.Table:
    """Ids of new rows that resemble a row with a smaller `owner` in their bucket; the block holds whole buckets."""
    copies: set[str] = set()
    if block.num_rows:
        block = block.sort_by([("band", "ascending"), ("owner", "ascending")])
        bands, owners = block["band"].to_pylist(), block["owner"].to_pylist()
        starts = [at for at in range(len(bands)) if not at or bands[at] != bands[at - 1]]
        sketches = np.frombuffer(b"".join(block["sketch"].to_pylist()), np.uint8).reshape(len(bands), -1)
        for start, end in zip(starts, [*starts[1:], len(bands)], strict=True):
            if end - start > 1:
                copies.update(owners[start + at] for at in followers(sketches[start:end], threshold))
    ids = [owner[1:] for owner in copies if owner[0] == _NEW]
    return pa.table({"row_id": pa.array(ids, pa.string())})


def followers(sketches: np.ndarray, threshold: float) -> list[int]:
    """Indices of the rows of a bucket that resemble an earlier row which stays.

    Args:
        sketches: uint8 [rows, permutations + NUM_PARTS * PART_PERMUTATIONS], as of `sketched`.
        threshold: least Jaccard similarity.
    """
    waiting = np.arange(len(sketches))
    found: list[int] = []
    for _ in range(LEADERS):
        if len(waiting) < 2:
            break
        leader, rest = waiting[0], waiting[1:]
        agrees = sketches[rest] == sketches[leader]
        similarities = [
            (part.mean(axis=1) - 1 / 256) / (1 - 1 / 256)
            for part in np.split(agrees, range(-NUM_PARTS * PART_PERMUTATIONS, 0, PART_PERMUTATIONS), axis=1)
        ]
        is_copy = similarities[0] >= threshold
        for similarity in similarities[1:]:
            is_copy &= similarity >= threshold - PART_TOLERANCE
        found.extend(rest[is_copy].tolist())
        waiting = rest[~is_copy]
    return found
