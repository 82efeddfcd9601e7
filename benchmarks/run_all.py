"""`make bench`: every benchmark at a small size, one after another, and one table at the end.

    python benchmarks/run_all.py [NAME ...] [--out runs/bench]

A benchmark that fails does not stop the others; its row says so and the exit code is 1. The whole output of each is
kept under `--out`. The sizes here show that everything runs, and the order of magnitude; the figures in docs/ come from
the sizes that the head of each script names.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
LIMIT_S = 1800  # of one benchmark
WIDTH = 150  # columns of the table if the output is a file


@dataclass(frozen=True)
class Benchmark:
    """A script, its arguments for a small size, and what it measures."""

    script: str
    arguments: tuple[str, ...]
    measures: str


BENCHMARKS = (
    Benchmark("reflection", ("2000",), "rows/s of reflection and ledger, scripted teacher"),
    Benchmark("teacher", ("32",), "tokens/s of the reflection stage against vLLM's own LLM.chat"),
    Benchmark("scoring", ("16",), "IFD pairs/s by transformers and by vLLM"),
    Benchmark(
        "attention",
        ("--sizes", "4096", "--rounds", "1", "--repeats", "2", "--output", "runs/bench"),
        "speed and memory of HyperAttention",
    ),
    Benchmark(
        "training",
        ("--tokens", "256", "--packs", "1", "--steps", "3"),
        "a training step against a plain torch loop",
    ),
    Benchmark(
        "checkpoints",
        ("--layers", "4", "--tokens", "256", "--steps", "2", "--saves", "2"),
        "how long training waits for a checkpoint",
    ),
    Benchmark("training_start", ("--rounds", "1"), "what comes before the first step of a training"),
    Benchmark(
        "same_curve", ("--stages", "2", "--paths", "1-2-1", "--steps", "3"), "losses after a resize of the workers"
    ),
    Benchmark("noise_norms", (), "norm of NEFTune's noise on each document, transformers' hook and ours"),
    Benchmark("sequence_parallel", ("--tokens", "2048"), "memory of a worker that shares a pack with another one"),
    Benchmark("long_training", ("step", "--tokens", "2048", "--window", "512"), "a training step, exact and Hyper"),
    Benchmark(
        "perplexity", ("--only", "exact", "window=1024", "--texts", "argparse"), "perplexity under HyperAttention"
    ),
    Benchmark("output_error", ("--layers", "20", "--rows", "32"), "error of HyperAttention's outputs"),
    Benchmark("ingredients", ("--layers", "20", "--rows", "16"), "how much each part of the estimator helps"),
    Benchmark(
        "aot_report",
        ("--targets", "sm_90", "--sizes", "64", "--kinds", "nominated"),
        "Triton kernels, compiled ahead of time",
    ),
    Benchmark("roofline", (), "floor times on GPUs, counted"),
    Benchmark("year", ("--refreshes", "12", "--really", "2"), "one more refresh after many, one look of the daemon"),
)
# Not run: modules that the others import, and scripts that need another environment.
NOT_RUN = {
    "run_all": "this file",
    "language_model": "imported by others",
    "packs": "imported by others",
    "training_steps": "imported by training.py",
    "same_curve_figure": "imported by same_curve.py",
    "chaos": "runs as long as it is told: see its head",
    "chaos_checks": "imported by chaos.py",
    "chaos_endpoint": "imported by chaos.py",
    "chaos_faults": "imported by chaos.py",
    "chaos_life": "imported by chaos.py",
    "chaos_ray": "imported by chaos.py",
    "chaos_daemon": "imported by chaos.py",
    "chaos_nodes": "imported by chaos.py",
    "gpu": "needs a GPU",
    "gpu_cases": "imported by gpu.py",
    "gpu_tiles": "imported by gpu.py",
    "gpu_training": "needs a GPU",
    "gpu_training_parts": "imported by gpu_training.py",
    "teacher_distilabel": "needs a Python with distilabel; set DISTILABEL_PYTHON and run teacher.py",
    "styles": "needs a file of rows and a real teacher, for minutes",
}


@dataclass(frozen=True)
class Result:
    """How one benchmark ended: exit code (124 if it took too long), seconds, and its last line."""

    code: int
    seconds: float
    last_line: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [benchmark.script for benchmark in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"run only these of: {', '.join(known)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the outputs (%(default)s)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [benchmark for benchmark in BENCHMARKS if not arguments.names or benchmark.script in arguments.names]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for number, benchmark in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {benchmark.script} {' '.join(benchmark.arguments)}", flush=True)
        results[benchmark] = run(benchmark, arguments.out / f"{benchmark.script}.txt")
    show(results, arguments.out)
    return int(any(result.code for result in results.values()))


def run(benchmark: Benchmark, output: Path) -> Result:
    """Run one script to its end or to the time limit; its output goes to a file."""
    command = [sys.executable, str(HERE / f"{benchmark.script}.py"), *benchmark.arguments]
    started = time.monotonic()
    with output.open("w") as stream:
        try:
            # The scripts and their arguments are the constants above.
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=LIMIT_S).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            code = 124
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return Result(code, time.monotonic() - started, lines[-1] if lines else "")


def show(results: dict[Benchmark, Result], out: Path) -> None:
    table = Table(title=f"benchmarks at small sizes; whole outputs in {out}", title_justify="left")
    table.add_column("benchmark", no_wrap=True)
    table.add_column("measures")
    table.add_column("ended", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("last line of its output", overflow="fold")
    for benchmark, result in results.items():
        ended = "well" if result.code == 0 else f"FAILED ({result.code})"
        table.add_row(benchmark.script, benchmark.measures, ended, f"{result.seconds:.0f}", result.last_line)
    terminal = sys.stdout.isatty()
    Console(width=None if terminal else WIDTH, markup=False, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
