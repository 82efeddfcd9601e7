"""Everything that combines rows of different blocks: rows of one key together, an outcome by id, sums over blocks."""

from collections.abc import Callable, Collection
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import ACTIVE, RAW, conform

ROWS_PER_PARTITION = 200_000
IS_RIGHT = "is right"  # a column only in the shuffle of `cogroup`
ID = pa.schema([("row_id", pa.string())])


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
    end = partial(_end, outcome=outcome, among=tuple(among))
    return cogroup((rows, RAW), (ids, ID), "row_id", 1 + num_rows // ROWS_PER_PARTITION, end)


def _end(rows: pa.Table, named: pa.Table, outcome: str, among: tuple[str, ...]) -> pa.Table:
    ids = named["row_id"].combine_chunks()
    ends = pc.and_(pc.is_in(rows["row_id"], ids), pc.is_in(rows["outcome"], pa.array(among, pa.string())))
    return rows.set_column(rows.column_names.index("outcome"), "outcome", pc.if_else(ends, outcome, rows["outcome"]))


def cogroup(
    left: tuple[Dataset, pa.Schema],
    right: tuple[Dataset, pa.Schema],
    key: str,
    num_blocks: int,
    combine: Callable[[pa.Table, pa.Table], pa.Table],
    num_cpus: float = 0.25,
) -> Dataset:
    """Hand `combine` the rows of two data sets by key: all rows of a key, of both, are in one call. Lazy.

    Args:
        left: a data set and the columns of it that `combine` receives first; one that it lacks is null there.
        right: the same for the second argument. The two may have columns of one name.
        key: a column of both, never null.
        num_blocks: at least 1; decides how many rows lie in the memory of one worker.
        combine: from the rows of some keys, which may be none on either side, to the rows of the result.
        num_cpus: of the tasks that call it.
    """
    wire = pa.schema(
        [pa.field(IS_RIGHT, pa.bool_()), left[1].field(key)]
        + [pa.field(f"left {field.name}", field.type) for field in left[1] if field.name != key]
        + [pa.field(f"right {field.name}", field.type) for field in right[1] if field.name != key]
    )
    sides = [
        data.map_batches(
            partial(_to_wire, side=side, schema=schema, key=key, wire=wire), batch_format="pyarrow", num_cpus=0.25
        )
        for (data, schema), side in ((left, "left"), (right, "right"))
    ]
    together = group_by_key(sides[0].union(sides[1]), key, num_blocks)
    split = partial(_split, schemas=(left[1], right[1]), key=key, combine=combine)
    return together.map_batches(split, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus)


def _to_wire(rows: pa.Table, side: str, schema: pa.Schema, key: str, wire: pa.Schema) -> pa.Table:
    """The rows in the columns that both sides share in the shuffle."""
    rows = conform(rows, schema)
    rows = rows.rename_columns([name if name == key else f"{side} {name}" for name in rows.column_names])
    return conform(rows.append_column(IS_RIGHT, pa.array([side == "right"] * rows.num_rows, pa.bool_())), wire)


def _split(
    together: pa.Table,
    schemas: tuple[pa.Schema, pa.Schema],
    key: str,
    combine: Callable[[pa.Table, pa.Table], pa.Table],
) -> pa.Table:
    if not together.num_rows:  # the shuffle may give a block no columns at all
        return combine(schemas[0].empty_table(), schemas[1].empty_table())
    parts = []
    for side, schema in zip(("left", "right"), schemas, strict=True):
        of_side = together[IS_RIGHT] if side == "right" else pc.invert(together[IS_RIGHT])
        names = [name if name == key else f"{side} {name}" for name in schema.names]
        parts.append(together.filter(of_side).select(names).rename_columns(schema.names).cast(schema))
    return combine(*parts)


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
