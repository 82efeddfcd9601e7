"""Everything that combines rows of different blocks: rows of one key together, an outcome by id, sums over blocks."""

from collections.abc import Collection
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import ACTIVE, RAW, conform

ROWS_PER_PARTITION = 200_000


def end_rows(rows: Dataset, ids: Dataset, outcome: str, num_rows: int, among: Collection[str] = (ACTIVE,)) -> Dataset:
    """Give the rows whose id is among `ids` this outcome.

    Args:
        rows: columns.RAW.
        ids: row_id; may repeat ids and hold others.
        outcome: dropped:<reason> or quarantined:<reason>.
        num_rows: about how many rows both have together; decides into how many parts they are shuffled.
        among: the outcomes that a row may have had; the others keep theirs.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    """
    tagged = rows.map_batches(partial(_tag, named=False), batch_format="pyarrow", num_cpus=0.25)
    named = ids.map_batches(partial(_tag, named=True), batch_format="pyarrow", num_cpus=0.25)
    both = group_by_key(tagged.union(named), "row_id", 1 + num_rows // ROWS_PER_PARTITION)
    return both.map_batches(
        partial(_end, outcome=outcome, among=tuple(among)), batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )


def _tag(rows: pa.Table, named: bool) -> pa.Table:
    rows = conform(rows.select(["row_id"]) if named else rows, RAW)
    return rows.append_column("named", pa.array([named] * rows.num_rows, pa.bool_()))


def _end(both: pa.Table, outcome: str, among: tuple[str, ...]) -> pa.Table:
    if not both.num_rows:  # the shuffle may give a block no columns at all
        return RAW.empty_table()
    ids = both.filter(both["named"])["row_id"].combine_chunks()
    rows = both.filter(pc.invert(both["named"])).drop_columns(["named"])
    ends = pc.and_(pc.is_in(rows["row_id"], ids), pc.is_in(rows["outcome"], pa.array(among, pa.string())))
    return rows.set_column(rows.column_names.index("outcome"), "outcome", pc.if_else(ends, outcome, rows["outcome"]))


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
