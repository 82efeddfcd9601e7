"""Overhead of the pipeline itself: rows per second through reflection and ledger with the scripted teacher.

The teacher answers at once, so this is the overhead of reading, prompting, keying, committing, joining and parsing.
`disk` is the ledger with its prompts; `files` are those of the ledger, whose footers every start reads. Before a
time is printed, the rows are checked: every row is returned parsed, the second run makes no call, and the third, a
refresh with one row per hundred in the ledger, makes calls for its own rows only.

    .venv/bin/python benchmarks/reflection.py [ROWS ...]
"""

import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.runtime import connected
from operators.columns import RAW
from operators.reflect.config import ReflectConfig
from operators.reflect.reflect import Reflection
from operators.reflect.reflect_instructions import reflect_instructions
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger

TEACHER = TeacherConfig(backend="scripted", model="fluent", batch_rows=1024)
PART = 10_000
TEXT = "Explain in a few words why the sea is salt and what follows from it for the people who live beside it. "


def write_rows(path: str, first: int, stop: int) -> None:
    """Write rows in parts, so that the peak of the driver's memory is the pipeline's, not this function's."""
    same = dict.fromkeys(("input", "turns_before", "turns_after", "extra", "ignored_columns", "outcome"), "")
    same |= {"origin": "benchmark", "escaped": False}
    with pq.ParquetWriter(path, RAW) as writer:
        for start in range(first, stop, PART):
            names = [f"{number:032x}" for number in range(start, min(start + PART, stop))]
            texts = {"row_id": names, "instruction": [TEXT + name for name in names], "response": [TEXT] * len(names)}
            columns = texts | {name: [value] * len(names) for name, value in same.items()}
            writer.write_table(pa.table(columns).select(RAW.names).cast(RAW))


def run(source: str, folder: str, num_rows: int) -> tuple[float, Ledger]:
    """Seconds of one pass; fails unless every row came back parsed."""
    ledger = Ledger(f"{folder}/ledger", prompts=f"{folder}/prompts")
    started = time.perf_counter()
    rows = reflect_instructions(
        ray.data.read_parquet(source), Reflection(ReflectConfig(), TEACHER, ledger, frozenset())
    )
    parsed = rows.filter(expr=ray.data.expressions.col("instruction_reflection") == "parsed").count()
    seconds = time.perf_counter() - started
    if parsed != num_rows:
        raise SystemExit(f"check failed: {parsed} rows parsed of {num_rows}; no time is reported")
    return seconds, ledger


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [10_000]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, ray {ray.__version__}, scripted teacher")
    print(f"{'rows':>9} {'run':>8} {'wall':>9} {'rows/s':>8} {'driver peak':>12} {'disk':>9} {'files':>6}")
    with connected():
        for num_rows in sizes:
            measure(num_rows)


def measure(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(f"{folder}/rows.parquet", 0, num_rows)
        write_rows(f"{folder}/more.parquet", num_rows, num_rows + num_rows // 100)
        for name, file, num, num_calls in (
            ("first", "rows", num_rows, num_rows),
            ("second", "rows", num_rows, 0),
            ("1 % more", "more", num_rows // 100, num_rows // 100),
        ):
            seconds, ledger = run(f"{folder}/{file}.parquet", folder, num)
            if ledger.metrics()["calls"] != num_calls:
                raise SystemExit("check failed: a call was made twice or not at all")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            stored = [path for part in ("ledger", "prompts") for path in Path(folder, part).rglob("*.parquet")]
            disk, files = (
                sum(path.stat().st_size for path in stored) / 1e6,
                len([*Path(folder, "ledger").rglob("*.p*")]),
            )
            told = f"{num:>9} {name:>8} {seconds:>7.1f} s {num / seconds:>8.0f} {peak:>8.0f} MiB {disk:>6.0f} MB"
            print(f"{told} {files:>6}", flush=True)


if __name__ == "__main__":
    main()
