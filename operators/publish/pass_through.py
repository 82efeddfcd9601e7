"""Columns of the source that are passed through unread, as columns of the published data set.

Inside the run they are one JSON object per row (`extra`). Each becomes a published column of the narrowest type that
holds all its values; values of mixed kinds, lists and objects become JSON text.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

Kinds = Mapping[str, str]  # name in the source -> "bool", "int", "float", "text" or "json"
TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(), "json": pa.string()}
PREFIX = "source_"  # added to the name of a column if the name is taken
INT64 = range(-(1 << 63), 1 << 63)


def kinds_of(rows: Dataset, taken: Collection[str]) -> dict[str, str]:
    """The columns that were passed through, in the order of their names -> the kind of their values.

    Args:
        rows: has a column `extra`.
        taken: names that the published columns have already.

    Raises:
        ValueError: two columns would have one name.
    """
    kinds: dict[str, str] = {}
    parts = rows.select_columns(["extra"]).map_batches(_kinds_of_block, batch_format="pyarrow", num_cpus=0.25)
    for part in parts.iter_rows():
        for name, kind in json.loads(part["kinds"]).items():
            kinds[name] = wider(kinds.get(name), kind)
    clashes = [name for name in kinds if name in taken and f"{PREFIX}{name}" in {*kinds, *taken}]
    if clashes:
        raise ValueError(f"publish: source.pass_through: {clashes[0]} and {PREFIX}{clashes[0]} have one name; drop one")
    return dict(sorted(kinds.items()))


def with_pass_through(table: pa.Table, extra: pa.ChunkedArray, kinds: Kinds, taken: Collection[str]) -> pa.Table:
    """Append the columns that were passed through; a row without a value has null.

    Args:
        table: published columns.
        extra: JSON objects or "" of the same rows.
        kinds: from `kinds_of`.
        taken: names of all published columns, also of those that `table` lacks: a column has one name everywhere.
    """
    if not kinds:
        return table
    objects = [json.loads(text) if text else {} for text in extra.to_pylist()]
    for name, kind in kinds.items():
        values = [_as_kind(found.get(name), kind) for found in objects]
        table = table.append_column(published_name(name, taken), pa.array(values, TYPES[kind]))
    return table


def published_name(name: str, taken: Collection[str]) -> str:
    """The published name of a passed-through column, given the names that are taken."""
    return f"{PREFIX}{name}" if name in taken else name


def wider(one: str | None, other: str) -> str:
    """The narrowest kind that holds values of both kinds."""
    if one is None or one == other:
        return other
    return "float" if {one, other} == {"int", "float"} else "json"


def _kinds_of_block(rows: pa.Table) -> pa.Table:
    kinds: dict[str, str] = {}
    for text in pc.unique(rows["extra"]).to_pylist():
        for name, value in json.loads(text).items() if text else ():
            if value is not None:
                kinds[name] = wider(kinds.get(name), _kind(value))
    return pa.table({"kinds": [json.dumps(kinds)]})


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in INT64 else "json"
    return {float: "float", str: "text"}.get(type(value), "json")


def _as_kind(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "float" else value
