"""Rows that an earlier refresh already had are dropped before anything is paid for them."""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import RAW, UNDER_WAY, conform
from operators.stage import require_columns

SEEN = "dropped:seen_in_earlier_refresh"
ROWS_PER_PARTITION = 200_000


def drop_seen(rows: Dataset, earlier: Dataset) -> Dataset:
    """Give rows under way whose id an earlier refresh had the outcome `dropped:seen_in_earlier_refresh`.

    One hash shuffle of the new rows and of the earlier ids; nothing is collected.

    Columns in:
        rows: columns.RAW. earlier: row_id, outcome, of the raw instructions of all earlier refreshes.
    Columns out:
        columns.RAW, as many rows as `rows` has.
    """
    require_columns("drop_seen", RAW.names, rows.columns() or [])
    require_columns("drop_seen", ["row_id", "outcome"], earlier.columns() or [])
    new = rows.map_batches(partial(_tag, earlier=False), batch_format="pyarrow", num_cpus=0.25)
    old = earlier.map_batches(partial(_tag, earlier=True), batch_format="pyarrow", num_cpus=0.25)
    num_blocks = 1 + (rows.count() + earlier.count()) // ROWS_PER_PARTITION
    both = new.union(old).repartition(num_blocks, keys=["row_id"])
    return both.map_batches(_drop, batch_size=None, batch_format="pyarrow", num_cpus=0.25)


def _tag(rows: pa.Table, earlier: bool) -> pa.Table:
    rows = conform(rows.select(["row_id", "outcome"]) if earlier else rows, RAW)
    return rows.append_column("earlier", pa.array([earlier] * rows.num_rows, pa.bool_()))


def _drop(both: pa.Table) -> pa.Table:
    earlier = both.filter(both["earlier"])
    # A row that an earlier refresh quarantined is judged anew: the reason may lie in the configuration.
    judged = earlier.filter(pc.invert(pc.starts_with(earlier["outcome"], "quarantined:")))
    rows = both.filter(pc.invert(both["earlier"])).drop_columns(["earlier"])
    seen = pc.and_(pc.is_in(rows["row_id"], judged["row_id"].combine_chunks()), pc.equal(rows["outcome"], UNDER_WAY))
    outcome = pc.if_else(seen, SEEN, rows["outcome"])
    return conform(rows.set_column(rows.column_names.index("outcome"), "outcome", outcome), RAW)
