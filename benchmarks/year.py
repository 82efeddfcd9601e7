"""A storage of many refreshes: the cost of one more refresh and of one look of the daemon, at its start and its end.

At the start and at the end, refreshes of a few rows are really run, up to the recycled rows, with the scripted teacher
in one process. The files of those in between are written directly, as a run leaves them: manifests, markers and Parquet
files of the same sizes, with their own rows. Student, evaluation and report are left out, because they do not depend on
the number of refreshes.

    .venv/bin/python benchmarks/year.py [--refreshes 365] [--really 3]
"""

import argparse
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import manifest as manifests
from cluster.files import checksums
from cluster.runtime import connected
from flows.config import load_config
from flows.graph import PACKED_SEQUENCES, RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.launch import run_flow
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run

ROWS = 8
OF_REFRESH = [name for name, spec in GRAPH.specs.items() if spec.partitions_def is not None]
reads, looks = 0, 0


def count_reads() -> None:
    """Count how often a manifest is read, and how often one is looked up."""
    read, look = manifests.read_manifest, manifests.current_manifest

    def counted_read(*place: Any) -> Any:
        global reads
        reads += 1
        return read(*place)

    def counted_look(*place: Any) -> Any:
        global looks
        looks += 1
        return look(*place)

    import cluster.storage as storage

    manifests.read_manifest = counted_read
    storage.current_manifest = counted_look


def settings(folder: Path) -> list[str]:
    return [
        f"storage={folder / 'storage'}",
        f"source.path={folder / 'source'}",
        "source.held_out_fraction=0.2",
        "select.policy=none",
        "schedule.settle_seconds=0",
    ]


def drop(folder: Path, number: int) -> None:
    (folder / "source").mkdir(exist_ok=True)
    rows = [
        {"instruction": f"Name river {number * ROWS + n} of the world.", "output": f"River {n} of day {number}."}
        for n in range(ROWS)
    ]
    (folder / "source" / f"day-{number:04}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def really_run(folder: Path, number: int) -> float:
    """Run one refresh of one new file, up to the recycled rows; returns seconds."""
    drop(folder, number)
    out = io.StringIO()
    started = time.monotonic()
    command = ["--config", "configs/smoke.yaml", *settings(folder), "--refresh", f"day-{number:04}"]
    code = run_flow(GRAPH, [*command, "--select", ",".join(OF_REFRESH)], (out, out))
    if code:
        raise SystemExit(out.getvalue())
    return time.monotonic() - started


def write_like(run: Run, folder: Path, model: str, number: int) -> None:
    """Write a refresh as a run would leave it, with other ids, and its file in the source."""
    drop(folder, number)
    key, name = f"day-{number:04}", f"day-{number:04}.jsonl"
    run = open_run(run.config, GRAPH.specs)
    [identity] = [file.identity for file in run.staleness.files.there() if file.name == name]
    for asset in OF_REFRESH:
        made = run.store.manifest(asset, model)
        if made is None:
            raise SystemExit(f"{asset} of {model} was not made")
        target = Path(run.store.folder(asset, key))
        shutil.copytree(run.store.folder(asset, model), target)
        for file in made.files:
            table = pq.read_table(target / file, partitioning=None)
            ids = pa.array([f"{number:08x}{row_id[8:]}" for row_id in table["row_id"].to_pylist()], pa.string())
            pq.write_table(table.set_column(table.column_names.index("row_id"), "row_id", ids), target / file)
        sizes = {file: (target / file).stat().st_size for file in made.files}
        found = checksums(run.store._filesystem, [str(target / file) for file in sizes], sum(sizes.values()))
        update = {
            "refresh": key,
            "order": number + 1,
            "files": sizes,
            "checksums": dict(zip(sizes, found, strict=True)),
        }
        made = made.model_copy(update=update)
        (target / "manifest.json").write_text(manifests.sealed(made))
        made_from = open_run(run.config, GRAPH.specs).staleness.describe(asset, key)
        if asset == RAW_INSTRUCTIONS:
            made_from["files"] = [[name, identity]]
        final = made.model_copy(update={"made_from": made_from, "fingerprint": manifests.fingerprint_of(made_from)})
        (target / "manifest.json").write_text(manifests.sealed(final))


def measured(what: Any) -> tuple[float, int, int]:
    """Call `what`; returns seconds, manifests read, and manifests looked up."""
    before, started = (reads, looks), time.monotonic()
    what()
    return time.monotonic() - started, reads - before[0], looks - before[1]


def look(folder: Path) -> None:
    """Do what the daemon does at every look, and check the assets over all refreshes as a run does."""
    run = open_run(load_config(Path("configs/smoke.yaml"), settings(folder)), GRAPH.specs)
    run.staleness.files.files_of(None)
    run.staleness.describe(PACKED_SEQUENCES, None)
    if run.staleness.is_stale(RECYCLED_INSTRUCTIONS, run.store.refreshes(RAW_INSTRUCTIONS)[-1]):
        raise SystemExit("the newest refresh is stale: what was written is not what a run leaves")


def state(folder: Path, number: int, seconds: list[float]) -> None:
    first, again = measured(lambda: look(folder)), measured(lambda: look(folder))
    files = sum(1 for file in (folder / "storage").rglob("*") if file.is_file())
    memory = psutil.Process().memory_info().rss >> 20
    shown = ", ".join(f"{each:.1f}" for each in seconds)
    counts = [f"{took:.2f} s ({read} manifests read, {looked} looked up)" for took, read, looked in (first, again)]
    print(f"{number} refreshes: one more takes {shown} s; a look {counts[0]}, the next {counts[1]}")
    print(f"    {files} files, {memory} MiB in the driver", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--refreshes", type=int, default=365)
    parser.add_argument("--really", type=int, default=3, help="at the start, and again at the end")
    arguments = parser.parse_args()
    count_reads()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}")
    with tempfile.TemporaryDirectory(prefix="year-") as name, connected():
        folder = Path(name)
        state_of_start = [really_run(folder, number) for number in range(arguments.really)]
        state(folder, arguments.really, state_of_start)
        run = open_run(load_config(Path("configs/smoke.yaml"), settings(folder)), GRAPH.specs)
        last = arguments.refreshes - arguments.really
        for number in range(arguments.really, last):
            write_like(run, folder, "day-0000", number)
        state(folder, arguments.refreshes, [really_run(folder, number) for number in range(last, arguments.refreshes)])


if __name__ == "__main__":
    main()
