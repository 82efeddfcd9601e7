"""Counts the rows of files by outcome, and sums their ids: manifests keep both, and checks compare them."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import fs

ID_WORDS = 8  # words of eight bytes: the part of a row's id that is summed


def sum_of_ids(row_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Sums of the ids' bytes, word by word: equal for the same rows in any order.

    If one row is missing and another is duplicated, the sums differ.
    """
    padded = np.asarray(row_ids.to_pylist(), dtype=f"S{8 * ID_WORDS}")
    summed: npt.NDArray[np.uint64] = padded.view(np.uint64).reshape(-1, ID_WORDS).sum(axis=0, dtype=np.uint64)
    return summed


def count_rows(filesystem: fs.FileSystem, files: list[str]) -> dict[str, Any]:
    """`rows`, `outcomes` (rows by outcome), `ids` (a sum over all row ids); reads two columns in batches."""
    data = pads.dataset(files, filesystem=filesystem, format="parquet")
    if "outcome" not in data.schema.names:
        return {"rows": data.count_rows()}
    named = "row_id" in data.schema.names
    outcomes: Counter[str] = Counter()
    ids = np.zeros(ID_WORDS, np.uint64)
    for batch in data.to_batches(columns=["outcome", *(["row_id"] if named else [])]):
        outcomes.update({item["values"]: item["counts"] for item in batch["outcome"].value_counts().to_pylist()})
        ids += sum_of_ids(batch["row_id"]) if named else 0
    summed = {"ids": ids.tobytes().hex()} if named else {}
    return {"rows": outcomes.total(), "outcomes": dict(sorted(outcomes.items())), **summed}
