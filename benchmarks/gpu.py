"""HyperAttention on a GPU: correct first, then timed against torch's fastest exact attention in the same run.

    python benchmarks/gpu.py                           # all phases, at most eight minutes on a fresh H100
    python benchmarks/gpu.py correct times --sizes 64  # some phases, some head sizes
    python benchmarks/gpu.py tune                      # a few tiles of each kernel, by the time of the kernel itself

bf16, B = 1, 32 heads, random inputs; forward + backward, median of five runs (three from 131072 tokens on). Kernels are
compiled in parallel processes before anything is timed. If a result is wrong, no time is printed. Every line is
complete by itself, so the output is useful even if a time limit cuts it off; `--markdown` writes the tables of the
README at the end.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_tiles
import torch
from gpu_cases import BF16, CASES, correct, inputs, listed, passes, smoothed, timed
from torch.profiler import ProfilerActivity, profile

from kernels.hyper_attention import HyperAttentionConfig, explain, hyper_attention
from kernels.hyper_attention.routing import exact_attention

HEADS = 32
LENGTHS = (8192, 16384, 32768, 131072)


def configuration(kind, tokens):
    """(configuration, causal) of a timed row."""
    segment = max(64, tokens // 1024)
    if kind.startswith("nominated"):
        return HyperAttentionConfig(mode="causal_local", choice="nominated", segment=segment, exact_below=256), True
    if kind == "no look-back":
        return replace(configuration("nominated", tokens)[0], lookback=0), True
    return HyperAttentionConfig(mode="paper", leaf=1024, exact_below=256), kind == "paper causal"


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
        smooth = smoothed(q).requires_grad_()
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        runs = 5 if tokens < 131072 else 3
        exact = {}
        # For more tokens, exact attention takes ten seconds per step, so it is left out.
        for causal in sorted({configuration(kind, tokens)[1] for kind in kinds}) if tokens <= 131072 else ():
            calls = passes(lambda q, k, v, c=causal: exact_attention(q, k, v, c, size**-0.5), q, k, v, grad)
            exact[causal] = [timed(call, runs) for call in calls]
            show("exact causal" if causal else "exact full", size, tokens, key_heads, exact[causal])
        for kind in kinds:
            config, causal = configuration(kind, tokens)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            query = smooth if kind == "nominated, like text" else q
            calls = passes(lambda q, k, v, c=causal, s=config: hyper_attention(q, k, v, c, config=s), query, k, v, grad)
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
            if config.nominates and config.lookback:
                print(f"LISTS {kind} | {size} | {tokens} | {listed(query, k, v, config)}", flush=True)
            if exact and kind != "no look-back" and query is q:
                automatic = replace(config, exact_below="auto")
                call = passes(
                    lambda q, k, v, c=causal, s=automatic: hyper_attention(q, k, v, c, config=s), q, k, v, grad
                )[1]
                way = explain(q, k, causal, config=automatic).path
                show(f"{kind}, auto ({way})", size, tokens, key_heads, [0.0, timed(call, runs)], exact[causal])
        del q, k, v, grad
        torch.cuda.empty_cache()


def show(kind, size, tokens, key_heads, found, exact=None, launches=0, memory=0.0, kernels=""):
    """Print one row: a line of JSON after a word by which it can be found."""
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
    """Eight documents of 4096 tokens, and one of 32768 with many short ones: the routed call and our kernels."""
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


def graph(size, tokens=8192):
    """A step captured in a CUDA graph: the same bits as without, and its time."""
    for kind in ("nominated", "paper causal", "paper full"):
        config, causal = configuration(kind, tokens)
        q, k, v, grad = inputs(HEADS, HEADS, tokens, tokens, size, BF16)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

        def step(q=q, k=k, v=v, grad=grad, config=config, causal=causal):
            out = hyper_attention(q, k, v, causal, config=config)
            return out, *torch.autograd.grad(out, (q, k, v), grad)

        # No autograd graph of these may stay alive: nodes of q, k and v belong to the stream that used them first.
        expected = [x.detach().clone() for x in step()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step()
        for x in found:
            x.detach().fill_(torch.nan)
        captured.replay()
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        print(f"GRAPH {kind} | {size} | {tokens} | same bits {same} | {timed(captured.replay, 5):.3f} ms", flush=True)


def step(size, tokens, kind, share=1):
    """A call of forward and backward with the committed or overridden tiles; on a share of the heads and tokens."""
    config, causal = configuration(kind, tokens)
    heads, length = HEADS // share, tokens // share + 16 * (share > 1)  # the same number of levels
    q, k, v, grad = inputs(heads, heads, length, length, size, BF16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return passes(lambda q, k, v: hyper_attention(q, k, v, causal, config=config), q, k, v, grad)[1]


def compile_one(size, kernel, tile, tokens, kind):
    """Compile one kernel that a later phase times."""
    if kernel:
        gpu_tiles.override(kernel, tile)
    step(size, tokens, kind, share=2)()
    torch.cuda.synchronize()


def in_processes(commands, seconds):
    """Run this script with each list of arguments, one process per core; yields (exit code, arguments, lines)."""
    end = time.time() + seconds

    def one(command):
        try:
            done = subprocess.run(  # noqa: S603 - this script
                [sys.executable, __file__, *command],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(1.0, end - time.time()),
                check=False,
            )
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            code, text = 1, "out of time"
        lines = [line for line in text.splitlines() if line.startswith(("CORRECT", "TIME", "TUNE", "LISTS"))]
        if code:
            lines += [f"FAILED {' '.join(command)}: {' / '.join(text.strip().splitlines()[-4:])[:900]}"]
        return code, command, lines

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, commands)


def run_phase(phase, arguments):
    """Run a phase and print its results."""
    if phase == "tune":
        compiled = gpu_tiles.compilations(arguments.sizes, max(arguments.lengths), arguments.tuned)
        for _, _, lines in in_processes(compiled, 120):
            print("\n".join(lines), flush=True) if lines else None
    for size in arguments.sizes:
        if phase == "times":
            times(size, arguments.lengths, arguments.kinds, arguments.key_heads)
        elif phase == "packed":
            packed(size)
        elif phase == "graph":
            graph(size)
        elif phase == "tune":
            gpu_tiles.tune(size, max(arguments.lengths), arguments.tuned, step, launches_of)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", default=["correct", "times", "packed", "graph"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["nominated", "nominated, like text", "no look-back", "paper causal", "paper full"],
    )
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
