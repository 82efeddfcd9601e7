"""Read the records of one refresh, and mark those that it or an earlier refresh already has."""

from typing import cast

import ray.data
from ray.data import Dataset

from operators.columns import RAW
from operators.read.archive import with_archive
from operators.read.config import ReadConfig
from operators.read.drop_near_duplicates import DeduplicateConfig, drop_near_duplicates
from operators.read.drop_seen import drop_seen
from operators.read.read_instructions import read_instructions


def read_refresh(
    files: list[str],
    earlier: Dataset | None,
    source: ReadConfig,
    deduplicate: DeduplicateConfig,
    special_tokens: frozenset[str],
    archived: Dataset | None = None,
) -> Dataset:
    """Read the files; give rows that were seen or resemble another their outcome.

    Each step reads its rows more than once, and so does what comes behind, so they are materialised in Ray's object
    store, which spills to disk: about 2 KB per row.

    Args:
        files: of the refresh, in order; none if all its rows are archived.
        earlier: columns.RAW of the refreshes before it; None if it is the first.
        source: how records are read.
        deduplicate: what counts as the same.
        special_tokens: of teacher and student; broken up in the texts.
        archived: columns.RAW as they are stored, of files of the refresh that cannot be read any more.

    Columns out:
        columns.RAW, one row for each row of `read_instructions` and each archived row that is not among them.
    """
    rows = read_instructions(source, files, special_tokens) if files else ray.data.from_arrow(RAW.empty_table())
    rows = rows.materialize()
    rows = rows if archived is None else with_archive(rows, archived, source, special_tokens).materialize()
    if not rows.count():  # all of its files were retracted; a shuffle of no rows would lose the columns
        return cast(Dataset, rows)
    rows = rows if earlier is None else drop_seen(rows, earlier).materialize()
    marked: Dataset = drop_near_duplicates(rows, earlier, deduplicate).materialize()
    return marked
