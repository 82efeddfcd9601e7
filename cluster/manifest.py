"""What a finished asset was made from and what it holds: `manifest.json` beside its files."""

import hashlib
import json
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

Description = dict[str, Any]  # what an asset is made from, as plain JSON


class Manifest(BaseModel):
    """The record of one finished asset, of one refresh if it has refreshes.

    Attributes:
        asset: its name.
        refresh: its key; None if the asset is made over all refreshes.
        order: the place of the refresh among all, from 1, kept when it is made again; 0 if unknown.
        fingerprint: a hash of `made_from`.
        made_from: code version, configuration and inputs.
        seconds: that making it took.
        peak_memory_mib: the machine's memory at its peak, above what was used before the run.
        files: sizes in bytes by name, of an asset that holds rows.
        checksums: CRC-32 of these files by name, hexadecimal.
        rows: how many rows the files hold; None if the asset holds a value.
        outcomes: rows by outcome.
        ids: a sum over all row ids, hexadecimal; "" if rows have no id.
        value: what an asset without rows holds, as plain JSON.
        metrics: numbers, and counts by name, that the stage reports about its work.
    """

    model_config = ConfigDict(frozen=True)

    asset: str = ""
    refresh: str | None = None
    order: int = 0
    fingerprint: str
    made_from: Description = {}
    seconds: float = 0.0
    peak_memory_mib: int = 0
    files: dict[str, int] = {}
    checksums: dict[str, str] = {}
    rows: int | None = None
    outcomes: dict[str, int] = {}
    ids: str = ""
    value: dict[str, Any] | None = None
    # Storages of before 2026-11-26 say figures.
    metrics: dict[str, int | float | dict[str, int]] = Field(
        default={}, validation_alias=AliasChoices("metrics", "figures")
    )


def fingerprint_of(description: Description) -> str:
    """A short hash of everything that an asset was made from."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
