"""Says in one line that a Parquet file is damaged, and what to do: page checksums are verified when one is read."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


class DamagedFileError(ValueError):
    """A file does not hold what was written; the message names it and the cure, and is shown as one line."""


@contextmanager
def naming_damage(path: str, cure: str) -> Iterator[None]:
    """Turn what pyarrow says of bytes that are not as they were written into one line.

    What an operating system or an object store says (no such file, no permission, no network) goes through.

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
