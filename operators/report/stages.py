"""The report's numbers of one stage, summed over the refreshes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class StageSummary(BaseModel):
    """One finished asset.

    Attributes:
        asset: its name.
        seconds: time to build it; None if unknown.
        rows_in: rows of the assets that it reads; None if none of them holds rows.
        rows_out: rows that it holds; None if it holds a value.
        outcomes: number of rows by outcome.
        cached: this run did not build it, but found it in the storage.
        teacher: the ledger's counts for it: calls, cached_calls, failed_calls, tokens, cost; empty without calls.
        peak_memory_mib: what the run's processes held at the peak; None if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: str
    seconds: float | None = None
    rows_in: int | None = None
    rows_out: int | None = None
    outcomes: dict[str, int] = {}
    cached: bool = False
    teacher: dict[str, Any] = Field(default_factory=dict)
    peak_memory_mib: int | None = None
