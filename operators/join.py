"""Gives rows an outcome by the ids of another data set: one shuffle, nothing collected."""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import RAW, UNDER_WAY, conform
from operators.shuffle import group_by_key

ROWS_PER_PARTITION = 200_000


def end_rows(rows: Dataset, ids: Dataset, outcome: str, num_rows: int) -> Dataset:
    """Give the rows under way whose id is among `ids` this outcome.

    Args:
        rows: columns.RAW.
        ids: row_id; may repeat ids and hold others.
        outcome: dropped:<reason> or quarantined:<reason>.
        num_rows: about how many rows both have together; decides into how many parts they are shuffled.

    Columns out:
        columns.RAW, as many rows as `rows` has.
    """
    tagged = rows.map_batches(partial(_tag, named=False), batch_format="pyarrow", num_cpus=0.25)
    named = ids.map_batches(partial(_tag, named=True), batch_format="pyarrow", num_cpus=0.25)
    both = group_by_key(tagged.union(named), "row_id", 1 + num_rows // ROWS_PER_PARTITION)
    return both.map_batches(partial(_end, outcome=outcome), batch_size=None, batch_format="pyarrow", num_cpus=0.25)


def _tag(rows: pa.Table, named: bool) -> pa.Table:
    rows = conform(rows.select(["row_id"]) if named else rows, RAW)
    return rows.append_column("named", pa.array([named] * rows.num_rows, pa.bool_()))


def _end(both: pa.Table, outcome: str) -> pa.Table:
    if not both.num_rows:  # the shuffle may give a block no columns at all
        return RAW.empty_table()
    ids = both.filter(both["named"])["row_id"].combine_chunks()
    rows = both.filter(pc.invert(both["named"])).drop_columns(["named"])
    ends = pc.and_(pc.is_in(rows["row_id"], ids), pc.equal(rows["outcome"], UNDER_WAY))
    return rows.set_column(rows.column_names.index("outcome"), "outcome", pc.if_else(ends, outcome, rows["outcome"]))
