"""The training data of a student when new data keeps coming: newest refreshes, a replay of earlier ones, general data.

Training on new rows alone makes a model forget. A few per cent of earlier data prevent most of this (Scialom et al.,
arXiv:2205.12393, section 4.2, where 1 % was enough for instructions).
"""

import hashlib
from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.data import Dataset
from ray.data.expressions import col

from operators.columns import ACTIVE, ORIGINAL, RECYCLED_OUTCOMES
from operators.stage import StageConfig

COLUMNS = ("row_id", "input", "turns_before", "turns_after", "outcome", "final_instruction", "final_response")
NOT_REPLAYED = "dropped:not_replayed"
GENERAL = "general-"  # prefix of the id of a row of general data, which is not a recycled row


class MixtureConfig(StageConfig):
    """The section `pack.mixture`: what a student is trained on besides the newest rows."""

    earlier: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the recycled rows of earlier refreshes that are trained on again. They are drawn anew "
        "for each new refresh.",
    )
    newest: int = Field(1, ge=1, description="Number of newest refreshes of which all rows are trained on.")
    general: str = Field(
        "",
        description="A file, folder or URI with more records in any format of source.path. They are trained on "
        "unchanged, without reflection; those that the source has too, or that repeat an evaluation text, are left "
        "out and counted.",
    )
    general_share: float = Field(
        0.1, gt=0, lt=1, description="Share of general data among the trained rows, if there is enough."
    )


def replayed(rows: Dataset, config: MixtureConfig, draw: str) -> Dataset:
    """Draw a share of the rows of earlier refreshes; the others get the outcome `dropped:not_replayed`.

    Columns in: RECYCLED. Columns out: COLUMNS.

    Args:
        rows: of the earlier refreshes.
        config: the share.
        draw: the newest refresh. With a row's id, it decides whether the row is drawn.
    """
    return rows.map_batches(
        partial(_replayed, share=config.earlier, draw=draw), batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )


def general_rows(raw: Dataset, config: MixtureConfig, num_recycled: int, draw: str) -> Dataset:
    """Draw about as many active rows of general data as `general_share` says, as rows to pack.

    Columns in: RAW. Columns out: COLUMNS, with ids that begin with GENERAL and the outcome "original". Counts the rows
    before it draws.

    Args:
        raw: the records as read.
        config: the share.
        num_recycled: number of recycled rows that are trained on.
        draw: see `replayed`.
    """
    active = raw.filter(expr=col("outcome") == ACTIVE)
    wanted = num_recycled * config.general_share / (1 - config.general_share)
    share = min(1.0, wanted / max(1, active.count()))
    return active.map_batches(
        partial(_general, share=share, draw=draw), batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )


def count_outcomes(rows: Dataset) -> dict[str, int]:
    """Number of rows by outcome, the most frequent first; "" is that of rows that can be used."""
    counted: Counter[str] = Counter()
    for part in rows.select_columns(["outcome"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        counted.update({one["values"]: one["counts"] for one in pc.value_counts(part["outcome"]).to_pylist()})
    return dict(counted.most_common())


def is_general(row_id: str) -> bool:
    """Whether this is the id of a row of general data."""
    return row_id.startswith(GENERAL)


def is_drawn(row_id: str, share: float, draw: str) -> bool:
    """Whether a row is in the drawn share. This depends on its id and the draw alone, so every machine agrees."""
    digest = hashlib.blake2b(f"{draw} {row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _replayed(rows: pa.Table, share: float, draw: str) -> pa.Table:
    def outcome(row: dict[str, Any]) -> str:
        taken = row["outcome"] not in RECYCLED_OUTCOMES or is_drawn(row["row_id"], share, draw)
        return str(row["outcome"]) if taken else NOT_REPLAYED

    outcomes = pa.array([outcome(row) for row in rows.select(["row_id", "outcome"]).to_pylist()], pa.string())
    place = rows.schema.get_field_index("outcome")
    return rows.set_column(place, "outcome", outcomes).select([*COLUMNS])


def _general(rows: pa.Table, share: float, draw: str) -> pa.Table:
    drawn = pa.array([is_drawn(row_id, share, draw) for row_id in rows["row_id"].to_pylist()], pa.bool_())
    rows = rows.filter(drawn)
    ids = pa.array([f"{GENERAL}{row_id}" for row_id in rows["row_id"].to_pylist()], pa.string())
    original = pa.array([ORIGINAL] * rows.num_rows, pa.string())
    texts = {"final_instruction": rows["instruction"], "final_response": rows["response"]}
    kept = {name: rows[name] for name in ("input", "turns_before", "turns_after")}
    columns: dict[str, Any] = {"row_id": ids, "outcome": original, **kept, **texts}
    return pa.table({name: columns[name] for name in COLUMNS})
