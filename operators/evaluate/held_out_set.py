"""The version of a held-out set: it grows with each refresh, and a decision records which one it was made on."""

import hashlib

from operators.evaluate.rows import read_rows


def version_of(rows: str) -> str:
    """A hash over the ids of the rows that an evaluation measured; "" if their file is not there.

    Args:
        rows: path or URI of the file, see `operators.evaluate.rows`; may be empty.
    """
    measured = read_rows(rows) if rows else None
    if measured is None:
        return ""
    return hashlib.sha256("\n".join(sorted(measured["row_id"].to_pylist())).encode()).hexdigest()[:16]
