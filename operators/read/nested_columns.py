"""Columns inside columns: `source.columns` may name `answers.text`, and labels are read by their names."""

import json
from collections.abc import Collection, Iterable, Mapping

import pyarrow as pa

_FEATURES = b"huggingface"  # key of a schema's metadata, which the library `datasets` writes


def roots(columns: Iterable[str]) -> set[str]:
    """The outermost names of paths such as `answers.text`."""
    return {name.partition(".")[0] for name in columns if "." in name}


def with_nested(record: Mapping[str, object], columns: Collection[str]) -> Mapping[str, object]:
    """The record, with what lies at each path among `columns` as a column of that name; None if nothing does.

    A list is passed through if it has one element, as the answers of SQuAD often have.
    """
    paths = [name for name in columns if "." in name and name not in record and name.partition(".")[0] in record]
    return {**record, **{path: _at(record, path.split(".")) for path in paths}} if paths else record


def paths_below(record: Mapping[str, object]) -> list[str]:
    """Names of the columns, and the paths to texts within those that are objects."""
    found = []
    for name, value in record.items():
        below = _texts(value, name)
        found += below or [name]
    return found


def class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its labels, where `datasets` wrote that a number stands for a name (ClassLabel)."""
    try:
        features = json.loads((schema.metadata or {}).get(_FEATURES, b"{}"))["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(label) for label in kind["names"]] for name, kind in kinds.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody else's metadata
        return {}


def with_labels(record: dict[str, object], labels: Mapping[str, list[str]]) -> dict[str, object]:
    """The record with names in place of the numbers of its labels; -1, which means no label, becomes None."""
    for name, names in labels.items():
        number = record.get(name)
        if isinstance(number, int):
            record[name] = names[number] if 0 <= number < len(names) else None
    return record


def _at(value: object, path: list[str]) -> object:
    for name in path:
        value = _only(value)
        value = value.get(name) if isinstance(value, dict) else None
    return _only(value)


def _only(value: object) -> object:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _texts(value: object, path: str) -> list[str]:
    value = _only(value)
    if not isinstance(value, dict):
        return []
    return [
        found
        for name, item in value.items()
        for found in (_texts(item, f"{path}.{name}") or ([f"{path}.{name}"] if isinstance(_only(item), str) else []))
    ]
