"""Finds the runs of words that many rows of the source share: they belong to a template and tell no row from another.

Counting is exact for up to SAMPLED_ROWS rows. Of more, a sample of about as many rows is counted, which a hash of the
row ids chooses; of 10^8 rows, it finds the templates of about a thousand rows or more. So memory does not grow with the
source: the hashes that are counted take at most about 1 GB of Ray's object store, PER_PARTITION of them one task, and
the common ones, of which every worker reads one copy, some ten MB for prose.
"""

import zlib
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from operators.columns import ACTIVE, HELD_OUT
from operators.join import group_by_key
from operators.ngrams import Hashes, run_hashes
from operators.read.drop_contaminated import CONTAMINATED

SAMPLED_ROWS = 1 << 20
RUNS_PER_ROW = 128  # about, for the number of partitions
PER_PARTITION = 16 << 20  # hashes; 128 MiB
COUNTED = (ACTIVE, HELD_OUT, CONTAMINATED)  # rows of other outcomes repeat one of these, or cannot be used

MOST_ROWS = 255  # a count beyond it is kept as this


class CommonRuns(NamedTuple):
    """Runs of words that occur in more than a number of rows.

    Attributes:
        hashes: uint64 [runs], sorted.
        rows: uint8 [runs], in how many of the counted rows each occurs; MOST_ROWS also stands for more.
    """

    hashes: Hashes
    rows: np.ndarray


def common_runs(sources: list[Dataset], num_rows: int, texts: Any, size: int, common_rows: int) -> Any:
    """Ray's reference to the `CommonRuns` of `size` words in more than `common_rows` rows.

    Args:
        sources: columns.RAW; each is read once.
        num_rows: of all sources together.
        texts: gives the texts that are counted for a table of columns.RAW; a picklable function.
        size: words of a run.
        common_rows: at least 1.
    """
    share = min(1.0, SAMPLED_ROWS / max(num_rows, 1))
    hashed = partial(_hashes, share=share, texts=texts, size=size)
    first, *others = (
        each.map_batches(hashed, batch_size=4096, batch_format="pyarrow", num_cpus=0.5) for each in sources
    )
    num_parts = 1 + int(num_rows * share) * RUNS_PER_ROW // PER_PARTITION
    grouped = group_by_key(first.union(*others) if others else first, "hash", num_parts)
    frequent = grouped.map_batches(
        partial(_frequent, common_rows=common_rows), batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    return ray.remote(num_cpus=0.25)(_sorted).remote(*frequent.to_arrow_refs())


def rows_with(found: Hashes, common: CommonRuns) -> np.ndarray:
    """In how many rows each run occurs; 0 if it is not common. uint8, as long as `found`."""
    if not len(common.hashes):
        return np.zeros(len(found), np.uint8)
    places = np.minimum(np.searchsorted(common.hashes, found), len(common.hashes) - 1)
    return np.where(common.hashes[places] == found, common.rows[places], np.uint8(0))


def is_sampled(row_id: str, share: float) -> bool:
    """Whether a row is one of the `share` that are counted; its id alone decides."""
    return share >= 1 or zlib.crc32(row_id.encode()) < share * 2**32


def _hashes(rows: pa.Table, share: float, texts: Any, size: int) -> pa.Table:
    """Columns out: `hash` of each run of words of each row, once per row."""
    rows = rows.filter(pc.is_in(rows["outcome"], pa.array(COUNTED)))
    if share < 1:
        rows = rows.filter(pa.array([is_sampled(row_id, share) for row_id in rows["row_id"].to_pylist()], pa.bool_()))
    found = [np.unique(run_hashes(text, size)) for text in texts(rows)]
    return pa.table({"hash": np.concatenate([np.empty(0, np.uint64), *found])})


def _frequent(block: pa.Table, common_rows: int) -> pa.Table:
    """The hashes that occur in more than `common_rows` rows; the block holds all occurrences of each of its hashes."""
    if not block.num_rows:  # the shuffle may give a block no columns at all
        return pa.table({"hash": np.empty(0, np.uint64), "rows": np.empty(0, np.uint8)})
    found, counts = np.unique(block["hash"].to_numpy(), return_counts=True)
    is_common = counts > common_rows
    return pa.table({"hash": found[is_common], "rows": np.minimum(counts[is_common], MOST_ROWS).astype(np.uint8)})


def _sorted(*blocks: pa.Table) -> CommonRuns:
    blocks = tuple(block for block in blocks if block.num_rows)
    hashes = np.concatenate([np.empty(0, np.uint64), *(block["hash"].to_numpy() for block in blocks)])
    rows = np.concatenate([np.empty(0, np.uint8), *(block["rows"].to_numpy() for block in blocks)])
    order = np.argsort(hashes)
    return CommonRuns(hashes[order], rows[order])
