"""Source files of every format for the tests of reading."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from operators.read.record_formats import Record, read_records
from operators.read.source_files import plan_pieces


def records_of(path: Path, range_bytes: int = 1 << 20) -> list[Record]:
    return [
        record for task in plan_pieces([str(path)], range_bytes) for piece in task for record in read_records(piece)
    ]


def alpaca_like(count: int, seed: int = 0) -> list[dict[str, str]]:
    random_state = random.Random(seed)
    return [
        {
            "instruction": f"Question {index} é😀",
            "input": "" if index % 3 else f"context {index}\r\nline",
            "output": "yes " * random_state.randint(1, 40),
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def write_json(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[dict[str, str]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], Path]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "parquet": write_parquet,
}
