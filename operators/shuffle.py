"""The only places where rows of different blocks meet: rows of one key are brought together, and numbers added up."""

import pyarrow as pa
from ray.data import Dataset


def group_by_key(rows: Dataset, key: str, num_blocks: int) -> Dataset:
    """All rows of one key in one block, lazily; blocks hold many keys, some may be empty and without columns.

    One block is gathered by one task, a tenth of a second; a hash shuffle starts actors first, one and a half seconds
    even for two rows (two CPUs).

    Args:
        rows: has a column `key`; those that were made from different data sets have the same columns.
        key: name of the column.
        num_blocks: at least 1; a block is held in the memory of one worker.
    """
    return rows.repartition(1) if num_blocks == 1 else rows.repartition(num_blocks, keys=[key])


def add_up(sums: Dataset, columns: list[str]) -> dict[str, int]:
    """The totals of numeric columns; 0 where there is no row.

    Args:
        sums: one row of partial sums a block, such as a `map_batches` gives; they come to the driver block by block.
        columns: their names.
    """
    totals = dict.fromkeys(columns, 0)
    for batch in sums.iter_batches(batch_size=None, batch_format="pyarrow"):
        table: pa.Table = batch
        for name in columns:
            totals[name] += sum(value or 0 for value in table[name].to_pylist())
    return totals
