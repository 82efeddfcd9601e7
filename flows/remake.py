"""Finds what `--stale` and `--retract FILE` make again: stale refreshes in the recorded order, and their dependents."""

from collections import Counter
from typing import TextIO

import pyarrow.compute as pc

from cluster.files import StorageError
from flows.config import ConfigError
from flows.graph import RAW_INSTRUCTIONS
from flows.retractions import Version, versions_to_retract
from flows.run import Run
from operators.read.archive import rows_of_files


def assets_by_refresh(run: Run) -> tuple[list[str], list[str]]:
    """Names of the assets that are made once per refresh, and of those that are made over all refreshes."""
    of_refresh = [name for name, spec in run.specs.items() if spec.partitions_def is not None]
    return of_refresh, [name for name in run.specs if name not in of_refresh]


def stale_assets(run: Run, refresh: str | None) -> list[str]:
    """Stale assets of a refresh, or (None) over all refreshes: missing ones, and those whose inputs changed."""
    names = assets_by_refresh(run)[refresh is None]
    return [name for name in names if run.staleness.is_stale(name, refresh)]


def tell_stale(run: Run, out: TextIO) -> int:
    """Print what `--stale` would make again, one line per refresh; returns the number of stale refreshes."""
    with run.store.looking():
        stale = {key: found for key in run.store.refreshes(RAW_INSTRUCTIONS) if (found := stale_assets(run, key))}
    for key, names in stale.items():
        out.write(f"stale: refresh {key}: {', '.join(names)}\n")
    over_all = stale_assets(run, None)
    if over_all:
        out.write(f"stale: over all refreshes: {', '.join(over_all)}\n")
    if not stale and not over_all:
        out.write("nothing is stale\n")
    return len(stale)


def retract(run: Run, name: str, out: TextIO) -> list[str]:
    """Retract a source file: record it, and print which refreshes hold how many of its rows.

    If an earlier retraction of the file was recorded but its rows are still there, this continues it.

    Returns:
        The refreshes that hold such rows, in the order in which they were made; their raw instructions are stale now.

    Raises:
        ConfigError: no refresh holds rows of the file.
    """
    already = run.retractions.all()
    refreshes = run.store.held_refreshes(RAW_INSTRUCTIONS)
    taken: dict[str, set[Version]] = {
        key: {(file, identity) for file, identity in run.staleness.files.taken(key)} for key in refreshes
    }
    held: set[Version] = set().union(*taken.values())
    unfinished = [version for version in held & already if version[0] == name]
    there = [(file.name, file.identity) for file in run.staleness.files.there()]
    try:
        versions = unfinished or versions_to_retract(name, held - already, there)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    affected = [key for key in refreshes if taken[key] & set(versions)]
    for key in affected:
        out.write(f"retract {name}: refresh {key} holds {_count(run, key, name, [file for file, _ in taken[key]])}\n")
    run.retractions.add(versions)
    if any(version in there for version in versions):
        out.write(f"retract {name}: the file that is there is not read again; another content of it would be new\n")
    elif any(file == name for file, _ in there):
        out.write(f"retract {name}: the file was changed since; what it holds now stays\n")
    return affected


def _count(run: Run, refresh: str, name: str, names: list[str]) -> str:
    """How many rows of the file the refresh holds, by outcome. Damaged rows are no obstacle to a retraction."""
    outcomes: Counter[str] = Counter()
    try:
        stored = rows_of_files(run.store.held_rows(RAW_INSTRUCTIONS, refresh, "they are taken out"), [name], names)
    except StorageError as error:
        return f"rows that could not be counted: {error}"
    for batch in stored.select_columns(["outcome"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        outcomes.update({each["values"]: each["counts"] for each in pc.value_counts(batch["outcome"]).to_pylist()})
    counts = ", ".join(f"{count} {outcome or 'recycled'}" for outcome, count in sorted(outcomes.items()))
    return f"{outcomes.total()} of its rows ({counts or 'none'})"
