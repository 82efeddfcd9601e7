"""Speed and memory of HyperAttention against torch's exact attention, after a check of the results.

    python benchmarks/attention.py                                  # n = 4k .. 32k, minutes
    python benchmarks/attention.py --sizes 8192 32768 131072        # 13 minutes, most of them exact attention

Each cell runs in a process of its own, so that its peak memory can be measured. There must be at least as many heads as
threads, because torch's exact backward pass runs only heads in parallel. A shared machine is slow for minutes at a
time, so cells are measured in rounds, with exact attention in between, and the median round counts. Writes
attention.json, attention.md and attention.svg.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention
from kernels.hyper_attention.operator import plan_of
from kernels.hyper_attention.reference import reference_attention

MOST_MEANS = 1024  # means that a query reads in mode causal_local; so segments grow with n beyond 32k
ENOUGH_S = 60  # after this many seconds there is no further repeat
COLOURS = {"exact": "#777777", "flex": "#9467bd", "paper": "#1f77b4", "causal_local": "#d62728"}


def inputs(heads, tokens, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, size, generator=generator).requires_grad_() for _ in range(4)]


def gate():
    """Raise an error unless output and gradients of the measured code agree with the reference."""
    q, k, v, grad = inputs(2, 700, 64)
    for causal, config in (
        (False, HyperAttentionConfig(block_size=64, num_samples=64, exact_below=64)),
        (True, HyperAttentionConfig(block_size=64, num_samples=64, leaf=64, exact_below=64)),
        (True, HyperAttentionConfig(mode="causal_local", window=128, lookback=96, exact_below=64)),
        (True, HyperAttentionConfig(mode="causal_local", choice="means", window=128, lookback=96, exact_below=64)),
    ):
        plan = plan_of(q, k, None, causal, config)
        mine = hyper_attention(q, k, v, causal, config=config)
        truth, _ = reference_attention(q, k, v, plan, 0.125)
        torch.testing.assert_close(mine, truth)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (mine, truth)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    print("gate: outputs and gradients agree with the reference")


def config_of(method, tokens):
    """The defaults; segments as in the README of the kernels, so that the work of a query is bounded."""
    if method == "paper":
        return HyperAttentionConfig()
    grown = 1 << max(0, tokens // MOST_MEANS - 1).bit_length()  # a power of two
    return HyperAttentionConfig(mode="causal_local", segment=max(HyperAttentionConfig.segment, grown))


def attention(method, causal, tokens):
    if method == "exact":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)
    if method == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)

        def flex(q, k, v):
            def rule(b, h, i, j):
                return i >= j

            mask = create_block_mask(rule, None, None, q.shape[2], k.shape[2], device="cpu") if causal else None
            return compiled(q, k, v, block_mask=mask)

        return flex
    config = config_of(method, tokens)
    return lambda q, k, v: hyper_attention(q, k, v, causal, config=config)


def measure(method, causal, tokens, heads, size, repeats):
    """Median seconds of forward and backward, and peak memory above that of the inputs, in MB.

    The first of several repeats is slower, because its memory is not mapped yet, as in the first step of a training.
    """
    q, k, v, grad = inputs(heads, tokens, size)
    if method == "flex":
        q, k, v = q.detach(), k.detach(), v.detach()
    function = attention(method, causal, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small = [x[:, :, :8192].detach().requires_grad_(method != "flex") for x in (q, k, v)]
    warm = function(*small)
    if method != "flex":
        warm.sum().backward()
    forward, backward, processor = [], [], []
    started = time.perf_counter()
    for _ in range(repeats):
        if forward and time.perf_counter() - started > ENOUGH_S:
            break
        begin, began = time.perf_counter(), time.process_time()
        out = function(q, k, v)
        middle = time.perf_counter()
        if method != "flex":
            torch.autograd.grad(out, (q, k, v), grad)
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
        processor.append(time.process_time() - began)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "method": method,
        "causal": causal,
        "n": tokens,
        "forward_s": statistics.median(forward),
        "backward_s": None if method == "flex" else statistics.median(backward),
        "cpu_s": statistics.median(processor),
        "memory_mb": memory,
    }


def cell(arguments, method, causal, tokens):
    command = [sys.executable, __file__, "--cell", json.dumps([method, causal, tokens])]
    command += ["--heads", str(arguments.heads), "--size", str(arguments.size), "--threads", str(arguments.threads)]
    command += ["--repeats", str(arguments.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    # The command consists of this file and numbers.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        print(f"{method} n={tokens} causal={causal}: no result ({done.stderr.strip().splitlines()[-1][:120]})")
        return None
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def measure_all(arguments):
    """One row for each cell with a result; exact attention is measured once, some of its cells after each round."""
    cells = [
        (method, causal, tokens)
        for method in arguments.methods
        for causal in ([True] if method == "causal_local" else [False, True])
        for tokens in arguments.sizes
    ]
    exact = [x for x in cells if x[0] == "exact"]
    found = {x: [] for x in cells}
    for turn in range(arguments.rounds):
        for x in [*(x for x in cells if x[0] != "exact"), *exact[turn :: arguments.rounds]]:
            found[x].append(cell(arguments, *x))
    rounds = [sorted(filter(None, rows), key=total) for rows in found.values()]
    return [rows[len(rows) // 2] for rows in rounds if rows]


def total(row):
    return row["forward_s"] + (row["backward_s"] or 0.0)


def table(rows, arguments):
    """Markdown: seconds forward and backward, ratio to exact at the same n, growth exponent between the last sizes."""
    exact = {(r["causal"], r["n"]): r for r in rows if r["method"] == "exact"}
    lines = [
        f"fp32, {arguments.heads} heads, d = {arguments.size}, {arguments.threads} threads, torch {torch.__version__},"
        f" median of {arguments.repeats} repeats (fewer after {ENOUGH_S} s) and, except for exact, of"
        f" {arguments.rounds} rounds. CPU s: both passes, all threads. Ratio: wall time of both passes, exact / this."
        " Growth: exponent of wall time to the next n.",
        "",
        "| attention | mask | n | forward s | backward s | CPU s | ratio | growth | peak MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = exact.get((row["causal"], row["n"]))
        same = [r for r in rows if (r["method"], r["causal"]) == (row["method"], row["causal"]) and r["n"] > row["n"]]
        growth = math.log(total(same[0]) / total(row)) / math.log(same[0]["n"] / row["n"]) if same else None
        backward = row["backward_s"]
        ratio = total(base) / total(row) if base and backward is not None else None
        numbers = [None if x is None else f"{x:.{d}f}" for x, d in ((backward, 3), (ratio, 1), (growth, 2))]
        shown = [x if x is not None else "-" for x in numbers]
        mask = "causal" if row["causal"] else "full"
        lines.append(
            f"| {row['method']} | {mask} | {row['n']} | {row['forward_s']:.3f} | {shown[0]} | {row['cpu_s']:.2f} "
            f"| {shown[1]} | {shown[2]} "
            f"| {row['memory_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows):
    """Log-log plot of forward + backward seconds over n, as SVG; dashed: causal."""
    width, height, margin = 640, 400, 60
    rows = [row for row in rows if row["backward_s"] is not None]
    xs, ys = [math.log2(r["n"]) for r in rows], [math.log10(total(r)) for r in rows]
    low, high = math.floor(min(ys)), math.ceil(max(ys))
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(n, seconds):
        x = margin + (math.log2(n) - first) / (last - first) * (width - 3 * margin)
        return x, height - margin - (math.log10(seconds) - low) / (high - low) * (height - 2 * margin)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/><g font-size="12" fill="#222">')
    for power in range(low, high + 1):
        _, y = place(2**first, 10.0**power)
        parts.append(f'<line x1="{margin}" x2="{width - 2 * margin}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{margin - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for n in sorted({row["n"] for row in rows}):
        x, _ = place(n, 1)
        parts.append(f'<text x="{x:.1f}" y="{height - margin + 20}" text-anchor="middle">{n // 1024}k</text>')
    for method, causal in dict.fromkeys((r["method"], r["causal"]) for r in rows):
        points = [place(r["n"], total(r)) for r in rows if (r["method"], r["causal"]) == (method, causal)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if causal else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[method]}" stroke-width="2"{dash}/>')
        x, y = points[-1]
        label = f"{method}{' causal' if causal and method != 'causal_local' else ''}"
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{COLOURS[method]}">{label}</text>')
    parts.append(f'<text x="{margin}" y="24">forward + backward over tokens</text></g></svg>')
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", default=["exact", "paper", "causal_local"], choices=list(COLOURS))
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="head size d")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="repeats of a cell in one process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a cell, spread over the run")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell, arguments.heads, arguments.size, arguments.repeats)))
        return
    gate()
    rows = measure_all(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "attention.json").write_text(json.dumps(rows, indent=1))
    (arguments.output / "attention.md").write_text(table(rows, arguments))
    (arguments.output / "attention.svg").write_text(figure(rows))
    print(table(rows, arguments))


if __name__ == "__main__":
    main()
