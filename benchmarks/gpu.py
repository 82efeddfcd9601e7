"""HyperAttention on a GPU: correct first, then timed against torch's fastest exact attention in the same run.

    python benchmarks/gpu.py                           # all phases, at most eight minutes on a fresh H100
    python benchmarks/gpu.py correct times --sizes 64  # some phases, some head sizes
    python benchmarks/gpu.py tune                      # a few tiles of each kernel, by the time of the kernel itself

bf16, B = 1, 32 heads, random inputs; forward + backward, median of five runs (three from 131072 tokens on). Kernels are
compiled in parallel processes before anything is timed. No time is printed if a result is wrong. Every line stands by
itself, so what a time limit leaves is still of use; `--markdown` writes the tables of the README at the end.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_cases import BF16, CASES, correct, inputs
from torch.profiler import ProfilerActivity, profile

from kernels.hyper_attention import HyperAttentionConfig, explain, hyper_attention
from kernels.hyper_attention.gpu.local import launches as local_launches
from kernels.hyper_attention.gpu.local import tiles as local_tiles
from kernels.hyper_attention.gpu.paper import launches as paper_launches
from kernels.hyper_attention.routing import exact_attention

HEADS = 32
LENGTHS = (8192, 16384, 32768, 131072)
TUNED = {
    "nominate": ((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    "attend": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2)),
    "query_gradient": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
    "mean_gradient": ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)),
    "key_gradient": ((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (128, 64, 8, 2)),
    "level": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3)),
    "level_query_gradient": ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 2)),
    "draw_gradient": ((32, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2)),
    "level_key_gradient": ((32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)),
}


def configuration(kind, tokens):
    """(configuration, causal) of a timed row."""
    segment = max(64, tokens // 1024)
    if kind == "nominated":
        return HyperAttentionConfig(mode="causal_local", choice="nominated", segment=segment, exact_below=256), True
    if kind == "no look-back":
        return replace(configuration("nominated", tokens)[0], lookback=0), True
    return HyperAttentionConfig(mode="paper", leaf=1024, exact_below=256), kind == "paper causal"


def timed(function, runs):
    """Median milliseconds."""
    function()
    torch.cuda.synchronize()
    found = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def passes(function, q, k, v, grad):
    """The forward pass, and both, as calls."""

    def forward():
        with torch.no_grad():
            function(q, k, v)

    def both():
        torch.autograd.grad(function(q, k, v), (q, k, v), grad)

    return forward, both


def launches_of(function):
    """Launches on the device, and their milliseconds by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_type.name == "CUDA"]
    return sum(event.count for event in events), {
        event.key: event.self_device_time_total / 1e3
        for event in sorted(events, key=lambda x: -x.self_device_time_total)
    }


def times(size, lengths, kinds, key_heads=HEADS):
    """Exact attention, then ours, at each length."""
    for tokens in lengths:
        q, k, v, grad = inputs(HEADS, key_heads, tokens, tokens, size, BF16)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        runs = 5 if tokens < 131072 else 3
        exact = {}
        # Beyond, exact attention takes ten seconds a step: it is left out.
        for causal in sorted({configuration(kind, tokens)[1] for kind in kinds}) if tokens <= 131072 else ():
            calls = passes(lambda q, k, v, c=causal: exact_attention(q, k, v, c, size**-0.5), q, k, v, grad)
            exact[causal] = [timed(call, runs) for call in calls]
            show("exact causal" if causal else "exact full", size, tokens, key_heads, exact[causal])
        for kind in kinds:
            config, causal = configuration(kind, tokens)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            calls = passes(lambda q, k, v, c=causal, s=config: hyper_attention(q, k, v, c, config=s), q, k, v, grad)
            try:
                found = [timed(call, runs) for call in calls]
                count, kernels = launches_of(calls[1])
            except Exception as error:
                print(
                    f"TIME {kind} | {size} | {tokens} | FAILED {type(error).__name__}: {str(error)[:300]}", flush=True
                )
                continue
            memory = (torch.cuda.max_memory_allocated() - held) / 2**30
            largest = ", ".join(f"{name[:28]} {value:.2f}" for name, value in list(kernels.items())[:9])
            show(kind, size, tokens, key_heads, found, exact.get(causal), count, memory, largest)
            if exact and kind != "no look-back":
                automatic = replace(config, exact_below="auto")
                call = passes(
                    lambda q, k, v, c=causal, s=automatic: hyper_attention(q, k, v, c, config=s), q, k, v, grad
                )[1]
                way = explain(q, k, causal, config=automatic).path
                show(f"{kind}, auto ({way})", size, tokens, key_heads, [0.0, timed(call, runs)], exact[causal])
        del q, k, v, grad
        torch.cuda.empty_cache()


def show(kind, size, tokens, key_heads, found, exact=None, launches=0, memory=0.0, kernels=""):
    """One row, as a line of JSON after a word to find it by."""
    row = {"kind": kind, "d": size, "tokens": tokens, "key_heads": key_heads}
    row |= {"forward": round(found[0], 3), "both": round(found[1], 3)}
    if exact:
        row |= {"over_exact": round(exact[1] / found[1], 3), "forward_over_exact": 0.0}
        if found[0]:
            row["forward_over_exact"] = round(exact[0] / found[0], 3)
    if launches:
        row |= {"launches": launches, "gib": round(memory, 2), "kernels": kernels}
    print(f"TIME {json.dumps(row)}", flush=True)


def packed(size):
    """Eight documents of 4096 tokens, and one of 32768 beside many short ones: the routed call and our kernels."""
    tokens = 32768
    q, k, v, grad = inputs(HEADS, HEADS, tokens, tokens, size, BF16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ids = torch.arange(8, device="cuda").repeat_interleave(4096)[None]
    for name, config in (
        ("varlen", HyperAttentionConfig(mode="causal_local", choice="nominated", exact_below=tokens, segment=64)),
        (
            "our kernels, exact",
            HyperAttentionConfig(mode="causal_local", choice="nominated", exact_below=4096, segment=64),
        ),
        ("our kernels", HyperAttentionConfig(mode="causal_local", choice="nominated", exact_below=256, segment=64)),
    ):
        calls = passes(
            lambda q, k, v, s=config: hyper_attention(q, k, v, True, config=s, document_ids=ids), q, k, v, grad
        )
        show(f"8 documents, {name}", size, tokens, HEADS, [timed(call, 5) for call in calls])


def override(kernel, tile):
    """Use one tile for a kernel, whatever the sizes."""
    found = local_tiles.tile_of
    chosen = local_tiles.Tile(*tile)
    for module in (local_launches, paper_launches):
        module.tile_of = lambda device, name, *rest: chosen if name == kernel else found(device, name, *rest)


def step(size, tokens, kind):
    """A call of forward and backward with the committed or overridden tiles."""
    config, causal = configuration(kind, tokens)
    q, k, v, grad = inputs(HEADS, HEADS, tokens, tokens, size, BF16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return passes(lambda q, k, v: hyper_attention(q, k, v, causal, config=config), q, k, v, grad)[1]


def compile_one(size, kernel, tile, tokens, kind):
    """Compile what a later phase times."""
    if kernel:
        override(kernel, tile)
    step(size, tokens, kind)()
    torch.cuda.synchronize()


def kind_of(kernel):
    """The call that a kernel is tuned in."""
    return "paper causal" if kernel.startswith(("level", "leaf", "draw")) else "nominated"


def tune(size, tokens, part):
    """Milliseconds of each kernel with each of a few tiles."""
    for kernel, tiles in TUNED.items():
        if not re.search(part, kernel):
            continue
        both = step(size, tokens, kind_of(kernel))
        for tile in tiles:
            override(kernel, tile)
            try:
                both()
                _, found = launches_of(both)
            except Exception as error:
                print(f"TUNE {kernel} | {size} | {tile} | FAILED {str(error)[:120]}", flush=True)
                continue
            spent = sum(value for name, value in found.items() if name.startswith(f"{kernel}_kernel"))
            print(f"TUNE {kernel} | {size} | {tokens} | {tile} | {spent:.3f} ms", flush=True)
        local_launches.tile_of = paper_launches.tile_of = local_tiles.tile_of


def in_processes(commands, seconds):
    """Run this script with each list of arguments at once; returns what they printed, those that failed first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = [
        subprocess.Popen(  # noqa: S603 - this script
            [sys.executable, __file__, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    end = time.time() + seconds
    for command, process in zip(commands, running, strict=True):
        try:
            text, _ = process.communicate(timeout=max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0] + "\nout of time"
        lines = [line for line in text.splitlines() if line.startswith(("CORRECT", "TIME", "TUNE"))]
        if process.returncode or not lines:
            lines += [f"FAILED {' '.join(command)}: {' / '.join(text.strip().splitlines()[-4:])[:900]}"]
        yield process.returncode, command, [line for line in lines if process.returncode or command[0] != "--compile"]


def run_phase(phase, arguments):
    """Print what a phase finds."""
    if phase == "tune":
        compiled = [
            ["--compile", str(size), "8192", kernel, json.dumps(tile), kind_of(kernel)]
            for size in arguments.sizes
            for kernel, tiles in TUNED.items()
            if re.search(arguments.tuned, kernel)
            for tile in tiles
        ]
        for _, _, lines in in_processes(compiled, 120):
            print("\n".join(lines), flush=True) if lines else None
    for size in arguments.sizes:
        if phase == "times":
            times(size, arguments.lengths, arguments.kinds, arguments.key_heads)
        elif phase == "packed":
            packed(size)
        elif phase == "tune":
            tune(size, 32768, arguments.tuned)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", default=["correct", "times", "packed"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--kinds", nargs="+", default=["nominated", "no look-back", "paper causal", "paper full"])
    parser.add_argument("--key-heads", type=int, default=HEADS)
    parser.add_argument("--cases", default="", help="check those whose name has this pattern")
    parser.add_argument("--tuned", default="", help="tune kernels whose name has this pattern")
    parser.add_argument("--case", help="internal: check one case in this process")
    parser.add_argument("--compile", nargs=5, help="internal: head size, tokens, kernel, tile, kind")
    arguments = parser.parse_args()
    if arguments.case:
        raise SystemExit(not correct(arguments.case))
    if arguments.compile:
        size, tokens, kernel, tile, kind = arguments.compile
        compile_one(int(size), kernel, tuple(json.loads(tile or "[]")), int(tokens), kind)
        return
    begin = time.time()

    def say(text):
        print(f"== {time.time() - begin:.0f} s {text}", flush=True)

    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {__import__('triton').__version__}")
    commands = (
        [["--case", name] for name in CASES if re.search(arguments.cases, name)]
        if "correct" in arguments.phases
        else []
    )
    lengths = {max(64, n // 1024): n for n in sorted(arguments.lengths, reverse=True)}.values()
    compiled = [
        ["--compile", str(size), str(tokens), "", "", kind]
        for size in arguments.sizes
        for kind in arguments.kinds
        for tokens in (arguments.lengths if kind == "paper causal" else lengths if "paper" not in kind else [8192])
    ]
    wrong = 0
    for code, command, lines in in_processes([*commands, *compiled], 150):
        print("\n".join(lines), flush=True) if lines else None
        wrong += bool(code) and command[0] == "--case"
    say(f"{wrong} of {len(commands)} cases wrong")
    if wrong:
        raise SystemExit("a result is wrong: nothing is timed")
    for phase in arguments.phases:
        run_phase(phase, arguments)
        say(f"{phase} done")


if __name__ == "__main__":
    main()
