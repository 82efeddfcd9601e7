"""Drops near-duplicates before the teacher is called for them: MinHash signatures, compared within LSH buckets.

Two records are near-duplicates if the Jaccard similarity of their word shingles, instruction, input and response
together, is at least `threshold`. Of each group one row stays: a row of an earlier refresh if there is one, else the
row of smallest id. So the result depends neither on the order of files nor on the number of workers.

Cost: about 0.2 ms of CPU per row for the signature, and one shuffle of `bands` (13 at the default threshold) small
records per row. Each record carries the signature's low bytes, so that the bucket can be compared without a join.
"""

from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.data import Dataset

from operators.columns import ACTIVE, RAW
from operators.join import ROWS_PER_PARTITION, end_rows, group_by_key
from operators.ngrams import runs, words
from operators.stage import StageConfig, require_columns

NEAR_DUPLICATE = "dropped:near_duplicate"
SEED = 1  # of the permutations; a constant of the method, like the hash
LEADERS = 16  # most groups in one bucket; a row that belongs to none of them stays

_EARLIER, _NEW = "0", "1"  # prefix of a row's id; the smallest stays


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


def drop_near_duplicates(rows: Dataset, earlier: Dataset | None, config: DeduplicateConfig) -> Dataset:
    """Give near-duplicates among the active rows the outcome `dropped:near_duplicate`.

    Args:
        rows: columns.RAW; read more than once, so it should be materialised or cheap to compute.
        earlier: columns.RAW of other refreshes, or None; their rows are never dropped here.
        config: which rows count as duplicates.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    Source:
        Broder 1997 (MinHash); Lee et al., arXiv 2107.06499, for what near-duplicates do to language models.
    """
    require_columns("drop_near_duplicates", RAW.names, rows.columns() or [])
    if not config.near:
        return rows
    num_rows = rows.count()
    banded = _banded(rows, _NEW, config)
    if earlier is not None:
        num_rows += earlier.count()
        banded = banded.union(_banded(earlier, _EARLIER, config))
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


def shingles(text: str, size: int) -> list[bytes]:
    """Runs of `size` words; a text without words is one empty shingle."""
    return [run.encode() for run in runs(words(text), size)] or [b""]


def _banded(rows: Dataset, owner: str, config: DeduplicateConfig) -> Dataset:
    return rows.map_batches(
        partial(_bands, owner=owner, config=config), batch_size=4096, batch_format="pyarrow", num_cpus=0.5
    )


def _bands(rows: pa.Table, owner: str, config: DeduplicateConfig) -> pa.Table:
    """One record for each active row and band: `band`, `owner`, `sketch`."""
    from datasketch import MinHash

    rows = rows.filter(pc.equal(rows["outcome"], ACTIVE))
    texts = zip(*(rows[name].to_pylist() for name in ("instruction", "input", "response")), strict=True)
    cut = (shingles("\n".join(each), config.shingle_words) for each in texts)
    hashed = MinHash.generator(cut, num_perm=config.num_permutations, seed=SEED)
    signatures = np.array([one.hashvalues for one in hashed], np.uint32).reshape(rows.num_rows, config.num_permutations)
    num_bands, width = bands_and_rows(config.threshold, config.num_permutations)
    # Keep the low byte of each value: two different values agree in it 1 in 256 times (b-bit MinHash, Li & König 2010).
    sketches = [bytes(one) for one in signatures.astype(np.uint8)]
    owners = [owner + row_id for row_id in rows["row_id"].to_pylist()]
    bands = [
        number.to_bytes(2, "little") + signature[number * width : (number + 1) * width].tobytes()
        for number in range(num_bands)
        for signature in signatures
    ]
    columns = {"band": bands, "owner": owners * num_bands, "sketch": sketches * num_bands}
    return pa.table(columns, pa.schema([("band", pa.binary()), ("owner", pa.string()), ("sketch", pa.binary())]))


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
        sketches: uint8 [rows, permutations].
        threshold: least Jaccard similarity.
    """
    waiting = np.arange(len(sketches))
    found: list[int] = []
    for _ in range(LEADERS):
        if len(waiting) < 2:
            break
        leader, rest = waiting[0], waiting[1:]
        agreement = (sketches[rest] == sketches[leader]).mean(axis=1)
        similarity = (agreement - 1 / 256) / (1 - 1 / 256)
        found.extend(rest[similarity >= threshold].tolist())
        waiting = rest[similarity < threshold]
    return found
