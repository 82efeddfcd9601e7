"""All that happens to the records of a refresh before anything is paid for them, in its order."""

from ray.data import Dataset

from operators.read.drop_contaminated import DecontaminateConfig, drop_contaminated
from operators.read.drop_near_duplicates import DeduplicateConfig, drop_near_duplicates
from operators.read.drop_seen import drop_seen
from operators.read.read_instructions import ReadConfig, read_instructions


def read_refresh(
    files: list[str],
    earlier: Dataset | None,
    source: ReadConfig,
    deduplicate: DeduplicateConfig,
    decontaminate: DecontaminateConfig,
    special_tokens: frozenset[str],
) -> Dataset:
    """Read the files; give rows that were seen, resemble another or repeat an evaluation text their outcome.

    Each step reads its rows more than once, so they are materialised in Ray's object store between the steps, which
    spills to disk.

    Args:
        files: of the refresh, in order.
        earlier: columns.RAW of the refreshes before it; None if it is the first.
        source: how records are read.
        deduplicate: what counts as the same.
        decontaminate: what an evaluation text is.
        special_tokens: of teacher and student; broken up in the texts.

    Columns out:
        columns.RAW, one row a record.
    """
    rows = read_instructions(source, files, special_tokens).materialize()
    rows = rows if earlier is None else drop_seen(rows, earlier).materialize()
    rows = drop_near_duplicates(rows, earlier, deduplicate).materialize()
    return drop_contaminated(rows, earlier, decontaminate)
