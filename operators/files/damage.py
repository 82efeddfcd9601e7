"""Turns pyarrow's errors about a damaged Parquet file into one line that says what to do.

Readers verify the checksums of pages, so damage is found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


class DamagedFileError(ValueError):
    """A file does not hold what was written; the message names the file and the cure, in one line."""


@contextmanager
def naming_damage(path: str, cure: str) -> Iterator[None]:
    """Turn pyarrow's errors about damaged bytes into a `DamagedFileError` of one line.

    Errors of the operating system or an object store (no such file, no permission, no network) pass unchanged.

    Args:
        path: of the file that is read inside.
        cure: what to do, as a part of a sentence.

    Raises:
        DamagedFileError: the bytes are damaged.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        words = " ".join(str(error).split())
        if getattr(error, "errno", None) or "AWS Error" in words or isinstance(error, pa.ArrowMemoryError):
            raise
        raise DamagedFileError(f"{path} is damaged ({words[:200]}); {cure}") from None
