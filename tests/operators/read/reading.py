"""Reads the rows of a small source, for the tests of reading."""

import json
from collections import Counter
from pathlib import Path

from ray.data import Dataset

from operators import columns
from operators.read.config import ReadConfig
from operators.read.read_instructions import read_instructions
from operators.read.source_files import list_source_files

TOKENS = frozenset({"</s>", "<|im_end|>"})
GOOD = {"instruction": "Name a fruit.", "input": "", "output": "Apple."}


def rows_of(rows: Dataset) -> list[dict[str, object]]:
    """All rows of a small test data set, sorted by row id."""
    rows = rows.materialize()
    assert rows.schema().names == columns.RAW.names
    found: list[dict[str, object]] = rows.take_all()
    return sorted(found, key=lambda row: str(row["row_id"]))


def read(path: Path | str, **settings: object) -> list[dict[str, object]]:
    config = ReadConfig.model_validate({"path": str(path), "held_out_fraction": 0, **settings})
    files = [file.path for file in list_source_files(str(path))]
    return rows_of(read_instructions(config, files, TOKENS))


def outcomes(rows: list[dict[str, object]]) -> Counter[object]:
    return Counter(row["outcome"] for row in rows)


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": f"{role} says"} for role in roles]})
