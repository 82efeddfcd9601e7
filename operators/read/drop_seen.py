"""Drops rows that an earlier refresh already had, before the teacher is called for them."""

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import ACTIVE, HELD_OUT, RAW
from operators.join import end_rows
from operators.stage import require_columns

SEEN = "dropped:seen_in_earlier_refresh"


def drop_seen(rows: Dataset, earlier: Dataset) -> Dataset:
    """Give rows whose id an earlier refresh had the outcome `dropped:seen_in_earlier_refresh`.

    Held-out rows count as seen too, so that no row is evaluated on twice. A row that an earlier refresh quarantined
    does not count as seen, because the configuration may have been the reason.

    Columns in:
        rows: columns.RAW. earlier: row_id, outcome, of the raw instructions of all earlier refreshes.
    Columns out:
        columns.RAW, as many rows as `rows` has.
    """
    require_columns("drop_seen", RAW.names, rows.columns() or [])
    require_columns("drop_seen", ["row_id", "outcome"], earlier.columns() or [])
    num_rows = rows.count() + earlier.count()
    ids = earlier.select_columns(["row_id", "outcome"]).map_batches(_judged, batch_format="pyarrow", num_cpus=0.25)
    return end_rows(rows, ids, SEEN, num_rows, among=(ACTIVE, HELD_OUT))


def _judged(earlier: pa.Table) -> pa.Table:
    return earlier.filter(pc.invert(pc.starts_with(earlier["outcome"], "quarantined:"))).select(["row_id"])
