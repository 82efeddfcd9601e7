"""Everything that combines rows of different blocks: grouping by key, outcomes by row id, sums over blocks."""

from collections.abc import Callable, Collection
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import ACTIVE, RAW, conform

ROWS_PER_PARTITION = 200_000
IS_RIGHT = "is right"  # a column that exists only inside the shuffle of `cogroup`
ID = pa.schema([("row_id", pa.string())])


def end_rows(rows: Dataset, ids: Dataset, outcome: str, num_rows: int, among: Collection[str] = (ACTIVE,)) -> Dataset:
    """Give the rows whose id is among `ids` this outcome.

    Args:
        rows: columns.RAW.
        ids: row_id; may repeat ids and hold ids that `rows` lacks.
        outcome: dropped:<reason> or quarantined:<reason>.
        num_rows: approximate number of rows of both data sets together; decides the number of parts of the shuffle.
        among: only rows with one of these outcomes get the new one.

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
    """Call `combine` with the rows of two data sets by key: one call gets all rows of a key from both. Lazy.

    Args:
        left: a data set and those of its columns that `combine` gets as first argument; a missing column is null.
        right: the same for the second argument. The two may have columns of one name.
        key: a column of both, never null.
        num_blocks: at least 1; decides how many rows lie in the memory of one worker.
        combine: takes the rows of some keys, possibly none on either side, and returns the rows of the result.
        num_cpus: of the tasks that call `combine`.
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
    """All rows of one key in one block, lazily. A block holds many keys; some blocks may be empty and without columns.

    For one block a single task gathers the rows, which takes a tenth of a second. A hash shuffle starts actors first,
    which takes one and a half seconds even for two rows (two CPUs).

    Args:
        rows: has a column `key`; all its blocks have the same columns.
        key: name of the column.
        num_blocks: at least 1; a block is held in the memory of one worker.
    """
    return rows.repartition(1) if num_blocks == 1 else rows.repartition(num_blocks, keys=[key])


def add_up(sums: Dataset, columns: list[str]) -> dict[str, int]:
    """The totals of numeric columns; 0 if there is no row.

    Args:
        sums: one row of partial sums per block, such as a `map_batches` gives; the driver reads them block by block.
        columns: their names.
    """
    totals = dict.fromkeys(columns, 0)
    for batch in sums.iter_batches(batch_size=None, batch_format="pyarrow"):
        table: pa.Table = batch
        for name in columns:
            totals[name] += sum(value or 0 for value in table[name].to_pylist())
    return totals
