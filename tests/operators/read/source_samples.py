"""Source files of every format for the tests of reading."""

import csv
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


def write_csv(path: Path, records: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def write_wrapped(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": records}, ensure_ascii=False), encoding="utf-8")
    return path


def write_pretty(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(record, indent=2) for record in records), encoding="utf-8")
    return path


def write_packed(path: Path, records: list[dict[str, str]]) -> Path:
    plain = write_jsonl(path.with_suffix(""), records)
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
        stream.write(plain.read_bytes())
    plain.unlink()
    return path


def write_utf16(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_bytes("\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode("utf-16"))
    return path


def write_arrow(path: Path, records: list[dict[str, str]]) -> Path:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    return path


# Keyed by the name of the file.
WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], Path]] = {
    "lines.jsonl": write_jsonl,
    "lines.ndjson": write_jsonl,
    "array.json": write_json,
    "array.jsonl": write_json,
    "object.json": write_wrapped,
    "pretty.jsonl": write_pretty,
    "rows.parquet": write_parquet,
    "stream.arrow": write_arrow,
    "table.csv": write_csv,
    "table.tsv": write_csv,
    "packed.jsonl.gz": write_packed,
    "packed.jsonl.zst": write_packed,
    "utf16.jsonl": write_utf16,
}
