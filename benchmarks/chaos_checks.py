"""Checks of a storage after a fault, for chaos.py: every promise is counted in the files themselves."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from benchmarks.chaos_endpoint import prompt_key
from operators.columns import RECYCLED_OUTCOMES
from operators.files.atomic import open_filesystem
from operators.files.copies import files_below, read_text

STAGES = (
    "raw_instructions",
    "instruction_reflections",
    "selected_instructions",
    "response_reflections",
    "recycled_instructions",
)
FINAL = ("row_id", "outcome", "final_instruction", "final_response")
LEFT_OVER = (".making", ".unfinished", ".replaced")
KEPT_A_DAY = ("ledger/", "prompts/", "scores/")  # killed writers' hidden files, which no reader looks at
WHOLE = {"partitioning": None, "page_checksum_verification": True}


@dataclass
class Found:
    """The counts of a check; `wrong` has one line for each promise that is not kept."""

    lost: int = 0
    doubled: int = 0
    stored_twice: int = 0
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def check(storage: str, records: int, expected: dict[str, tuple[str, ...]] | None, *, trained: bool) -> Found:
    """Read a storage whose last run ended with 0.

    Args:
        storage: folder or URI.
        records: number of records in the source.
        expected: the final rows of a run without faults, by id; None for that run itself.
        trained: whether the run also trained, evaluated and released.
    """
    found = Found()
    last = _conserved(storage, records, found)
    kept = [row for row in last if row["outcome"] in RECYCLED_OUTCOMES]
    gone = [row for row in last if row["outcome"].startswith(("quarantined:", "dropped:"))]
    if len(kept) + len(gone) != records:
        found.wrong.append(f"{len(kept)} recycled + {len(gone)} quarantined or dropped, the source has {records}")
    twice = Counter(row["row_id"] for row in kept)
    found.doubled = sum(number - 1 for number in twice.values())
    found.rows = {row["row_id"]: tuple(str(row[name]) for name in FINAL[1:]) for row in kept}
    if expected is not None:
        found.lost = len(expected.keys() - found.rows.keys())
        other = [key for key in expected.keys() & found.rows.keys() if expected[key] != found.rows[key]]
        if other or found.rows.keys() - expected.keys():
            new = len(found.rows.keys() - expected.keys())
            found.wrong.append(f"{len(other)} rows differ from those of a run without faults, {new} are new")
    found.stored_twice = sum(number - 1 for number in stored_calls(storage).values())
    found.wrong += _published(storage, len(kept))
    if trained:
        found.wrong += _released(storage)
    left = [name for name in files_below(storage) if any(part in name for part in LEFT_OVER)]
    left = [name for name in left if not name.startswith(KEPT_A_DAY)]
    if left:
        found.wrong.append(f"left over: {', '.join(left[:3])}")
    numbers = {name: getattr(found, name) for name in ("lost", "doubled", "stored_twice")}
    found.wrong += [f"{number} {name.replace('_', ' ')}" for name, number in numbers.items() if number]
    return found


def _conserved(storage: str, records: int, found: Found) -> list[dict[str, Any]]:
    """Check that every stage has the rows of the source; returns the rows of the last stage."""
    tables = {stage: _rows_of(storage, stage) for stage in STAGES}
    ids = {stage: Counter(table["row_id"].to_pylist()) for stage, table in tables.items()}
    for stage in STAGES:
        if tables[stage].num_rows != records:
            found.wrong.append(f"{stage}: {tables[stage].num_rows} rows, the source has {records}")
        if ids[stage] != ids[STAGES[0]]:
            found.wrong.append(f"{stage}: other rows than {STAGES[0]}")
    last: list[dict[str, Any]] = tables[STAGES[-1]].select(FINAL).to_pylist()
    return last


def stored_calls(storage: str) -> Counter[str]:
    """Key of a call -> number of answers to it in the ledger."""
    stored: Counter[str] = Counter()
    for name in files_below(f"{storage}/ledger"):
        if name.endswith(".parquet") and "/." not in name:
            filesystem, path = open_filesystem(f"{storage}/ledger/{name}")
            try:
                table = pq.read_table(path, filesystem=filesystem, columns=["call_key", "error"], **WHOLE)
            except (OSError, pa.ArrowException):  # damaged, or being replaced
                continue
            stored.update(row["call_key"] for row in table.to_pylist() if not row["error"])
    return stored


def stored_prompts(storage: str) -> set[str]:
    """The prompts whose answers are in the ledger, as the keys by which the endpoint counts."""
    stored, asked = stored_calls(storage), set()
    for name in files_below(f"{storage}/prompts"):
        if name.endswith(".parquet") and "/." not in name:
            filesystem, path = open_filesystem(f"{storage}/prompts/{name}")
            try:
                rows = pq.read_table(path, filesystem=filesystem, **WHOLE).to_pylist()
            except (OSError, pa.ArrowException):
                continue
            asked |= {prompt_key(json.loads(row["messages"])) for row in rows if row["call_key"] in stored}
    return asked


def _rows_of(storage: str, asset: str) -> pa.Table:
    """The rows of all refreshes, from the files that the manifests name."""
    tables = []
    for name in files_below(f"{storage}/assets/{asset}"):
        folder, _, file = name.rpartition("/")
        if file == "manifest.json":
            manifest = json.loads(read_text(f"{storage}/assets/{asset}/{name}") or "{}")
            for part in manifest["files"]:
                filesystem, path = open_filesystem(f"{storage}/assets/{asset}/{folder}/{part}")
                tables.append(pq.read_table(path, filesystem=filesystem, partitioning=None))
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({"row_id": []})


def _published(storage: str, rows: int) -> list[str]:
    manifest: dict[str, Any] = json.loads(read_text(f"{storage}/assets/published_dataset/manifest.json") or "{}")
    wrong = [] if manifest.get("value", {}).get("rows") == rows else [f"published_dataset says {manifest.get('value')}"]
    names = list(files_below(f"{storage}/published"))
    if "README.md" not in names:
        return [*wrong, "published: no card"]
    version = ""
    if any(name.startswith("versions/") for name in names):
        card = read_text(f"{storage}/published/README.md") or ""
        version = next(name for name in names if name.startswith("versions/") and name.split("/")[1] in card)
        version = "/".join(version.split("/")[:2]) + "/"
    here = [name.removeprefix(version) for name in names if name.startswith(version)]
    for kind in ("parquet", "messages", "alpaca"):
        count = 0
        for name in here:
            if name.startswith(f"{kind}/"):
                filesystem, path = open_filesystem(f"{storage}/published/{version}{name}")
                form = "parquet" if kind == "parquet" else "json"
                try:
                    count += pads.dataset(path, filesystem=filesystem, format=form).to_table().num_rows
                except (OSError, pa.ArrowException) as error:
                    wrong.append(f"published/{name} cannot be read: {error}")
        if count != rows:
            wrong.append(f"published/{kind} holds {count} rows, {rows} were recycled")
    json.loads(read_text(f"{storage}/published/{version}lineage.json") or "")
    return wrong


def _released(storage: str) -> list[str]:
    released = json.loads(read_text(f"{storage}/released.json") or "{}")
    version = released.get("version", "")
    names = set(files_below(f"{storage}/students/{version}")) if version else set()
    missing = {"manifest.json", "config.json", "model.safetensors", "metrics.jsonl"} - names
    wrong = [f"released.json points to {version!r}, which lacks {', '.join(sorted(missing))}"] if missing else []
    if any(name.startswith("checkpoints/") for name in names):
        wrong.append(f"students/{version} still has checkpoints")
    decisions = [
        json.loads(read_text(f"{storage}/releases/{name}") or "") for name in files_below(f"{storage}/releases")
    ]
    if not decisions:
        wrong.append("releases/ holds no decision")
    return wrong
