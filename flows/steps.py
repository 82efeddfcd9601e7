"""Which rows a training step learns from: `--step N`."""

from typing import TextIO

from flows.config import ConfigError
from flows.exit_codes import DONE
from flows.graph import PACKED_SEQUENCES
from flows.run import Run


def print_step(run: Run, step: int, out: TextIO) -> int:
    """Print the ids of the rows that optimizer step `step` (from 0) learns from under this configuration; returns 0.

    Raises:
        ConfigError: nothing is packed yet, or the training has no such step.
    """
    if run.store.manifest(PACKED_SEQUENCES) is None:
        raise ConfigError(
            f"--step: {PACKED_SEQUENCES} is not made in {run.config.storage} yet; run without --step first"
        )
    from operators.train.pack_order import index_of  # here, because it imports torch, which takes seconds

    try:
        index = index_of(run.store.rows(PACKED_SEQUENCES, [None]))
        rows = index.rows_of_step(run.config.train, step)
    except ValueError as error:
        raise ConfigError(f"--step: {error}") from None
    epoch, trained = index.order(run.config.train).epoch(step), index.num_trained(run.config.train)
    out.write(f"step {step}, epoch {epoch}: {len(rows)} rows; each of the {trained} rows is in one step of an epoch\n")
    out.writelines(f"{row_id}\n" for row_id in rows)
    return DONE
