"""Columns inside columns: `source.columns` may name `answers.text`; and numeric labels are replaced by their names."""

import json
from collections.abc import Collection, Iterable, Mapping

import pyarrow as pa

_FEATURES = b"huggingface"  # key of a schema's metadata, which the library `datasets` writes


def roots(columns: Iterable[str]) -> set[str]:
    """The outermost names of paths such as `answers.text`."""
    return {name.partition(".")[0] for name in columns if "." in name}


def with_nested(record: Mapping[str, object], columns: Collection[str]) -> Mapping[str, object]:
    """The record with one more column for each path among `columns`, None if nothing is there.

    A path goes through a list if the list has one element, as the answers of SQuAD often do.
    """
    paths = [name for name in columns if "." in name and name not in record and name.partition(".")[0] in record]
    return {**record, **{path: _at(record, path.split(".")) for path in paths}} if paths else record


def paths_below(record: Mapping[str, object]) -> list[str]:
    """Names of the columns; for a column that is an object, the paths to its texts."""
    found = []
    for name, value in record.items():
        below = _texts(value, name)
        found += below or [name]
    return found


def class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its labels, for columns that `datasets` stored as numbers (ClassLabel)."""
    try:
        features = json.loads((schema.metadata or {}).get(_FEATURES, b"{}"))["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(label) for label in kind["names"]] for name, kind in kinds.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # another program wrote metadata under this key
        return {}


def with_labels(record: dict[str, object], labels: Mapping[str, list[str]]) -> dict[str, object]:
    """The record with names in place of the numbers of its labels; -1 means no label and becomes None."""
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
