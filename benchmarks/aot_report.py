"""Compiles the Triton kernels for GPUs that this machine does not have, and counts registers and instructions.

    python benchmarks/aot_report.py > docs/aot.md                           # all: many minutes
    python benchmarks/aot_report.py --targets sm_90 --kinds nominated --json  # one line of JSON for each kernel
    PYTHONPATH=folder/of/triton-3.6 python benchmarks/aot_report.py --json    # with another release of Triton

The launches of a forward and a backward pass are those of the library, with its committed tiles, arguments and
alignments. Only the driver is replaced, by one that names the target and runs nothing.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.gpu.local import launches as local
from kernels.hyper_attention.gpu.local import tiles
from kernels.hyper_attention.gpu.paper import launches as paper
from kernels.neftune import batch_of_pack
from kernels.neftune_triton import KINDS as NOISES
from kernels.neftune_triton import launch as add_noise

# Shared memory of a block in KB, at most: CUDA C programming guide, table of compute capabilities; AMD CDNA3 ISA, LDS.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("nominated", "nominated, packed", "paper causal", "paper full", "neftune")
TOKENS = 2048
EMBEDDING = 2048  # columns of an embedding; the kernel of the noise has no head size


class Driver:
    """A driver that pretends to have a GPU of one target."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def compiled(name, head_size, dtype, kinds, segment):
    """Compile the launches of the kinds; yields (kind, name, options, kernel)."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels.append((kind, self.fn.__name__.removesuffix("_kernel"), options, kernel))

    tiles.architecture = lambda device: name
    torch._assert_async = lambda *arguments: None
    JITFunction.run = compile_only
    driver.set_active(Driver(TARGETS[name][0]))
    for kind in kinds:
        if kind == "neftune":
            batch = batch_of_pack([TOKENS // 2], [3], TOKENS, 0)
            for noise in NOISES:
                add_noise(torch.zeros(1, TOKENS, EMBEDDING, dtype=dtype), batch, 5.0, 1 << 62, noise)
            continue
        q, k, v = (torch.zeros(1, heads, TOKENS, head_size, dtype=dtype) for heads in (4, 2, 2))
        ids = torch.zeros(1, TOKENS, dtype=torch.int64) if "packed" in kind else None
        causal, path = kind != "paper full", paper if "paper" in kind else local
        sizes = {"mode": "paper"} if "paper" in kind else {"mode": "causal_local", "choice": "nominated"}
        config = HyperAttentionConfig(**sizes, segment=segment, exact_below=512)
        out, lse, buffer = path.forward(q, k, v, ids, causal, config, 0.1)
        path.backward(q, None, q, k, v, out, lse, buffer, ids is not None, causal, config, 0.1)
    JITFunction.run = run
    seen = set()
    for kind, label, options, kernel in kernels:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            yield kind, label, options, kernel


def counts(kernel, name):
    """Registers, bytes of stack, spilling instructions, shared KB, tensor-core and asynchronous copy instructions."""
    shared = kernel.metadata.shared / 1024
    if name == "gfx942":
        text = kernel.asm["amdgcn"]

        def field(key):
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        return {
            "registers": field("vgpr_count"),
            "stack": field("private_segment_fixed_size"),
            "spills": field("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", text)),
            "lanes": field("sgpr_spill_count"),
            "shared_kb": shared,
            "tensor_cores": text.count("v_mfma"),
            "copies": len(re.findall(r"(?:global|buffer)_load_lds", text)),
            "atomics": len(re.findall(r"(?:global|buffer|flat)_atomic", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (tool("cuobjdump", flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "lanes": 0,
        "shared_kb": shared,
        "tensor_cores": len(re.findall(rf"\b{TENSOR_CORES[name]}\b", text)),
        "warpgroup": len(re.findall(r"\bHGMMA\b", text)),
        "narrowest": min((int(n) for n in re.findall(r"HGMMA\.64x(\d+)x", text)), default=0),
        "copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", text)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", text)),
    }


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    # The program comes with the installed wheel, and the file is ours.
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout  # noqa: S603


HEAD = """# The Triton kernels, compiled ahead of time

Written by `python benchmarks/aot_report.py {command}`.
The kernels were compiled and counted here; the kernels README has the times.

The launches of a forward and a backward pass, {dtype}, with the committed tiles, segments of {segment}; Triton
{version}. Tile: rows of queries x keys x warps; for NEFTune tokens x columns x warps, and d is the embedding's size.
Stack: reserved bytes. Spills: vector registers, and instructions, that use the stack. Lanes: scalar registers of
gfx942 that are kept in lanes of vector registers.
Shared: KB of a block / the target's limit. Tensor cores: matrix instructions ({cores}). Copies: asynchronous, from
global to shared memory.

The tiles are those that were the fastest on an H100 with Triton 3.6; with Triton 3.9 some of them spill: at d = 64 on
sm_90 level_query_gradient; at d = 128, not listed here, attend (16 instructions), query_gradient (24), mean_gradient
(19) and key_gradient (109). Tiles for 3.9 were not timed. fp32 has no warpgroup products, as ptxas 12.8 builds
them wrongly.

| kernel | kind | d | target | tile | registers | stack | spills | lanes | shared | tensor cores | copies | atomics |
|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"""
ROW = """| {kernel} | {kind} | {d} | {target} | {tile} | {registers} | {stack} | {spills} | {lanes} \
| {shared_kb:.0f} / {limit_kb} | {tensor_cores} | {copies} | {atomics} |"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--segment", type=int, default=64, help="tokens of a pooled segment")
    parser.add_argument("--json", action="store_true", help="one line of JSON per kernel")
    arguments = parser.parse_args()
    if not arguments.json:
        cores, command = ", ".join(f"{TENSOR_CORES[x]} on {x}" for x in arguments.targets), shlex.join(sys.argv[1:])
        values = {"dtype": arguments.dtype, "version": triton.__version__, "segment": arguments.segment, "cores": cores}
        print(HEAD.format(command=f"{command} > docs/aot.md".strip(), **values))
    for name in arguments.targets:
        for size in arguments.sizes:
            found = compiled(name, size, DTYPES[arguments.dtype], arguments.kinds, arguments.segment)
            for kind, label, options, kernel in found:
                row = counts(kernel, name)
                if "KIND" in options:
                    row["fused"] = kernel.asm.get("ptx", "").count("fma.rn.f32")  # none may be: see the kernel
                    label, size = f"{label}, {NOISES[options['KIND']]}", EMBEDDING
                tile = "x".join(str(options[key]) for key in ("BM", "BN", "BT", "BD", "num_warps") if key in options)
                row |= {"kernel": label, "kind": kind, "d": size, "target": name, "tile": tile}
                row["limit_kb"] = TARGETS[name][1]
                print(json.dumps(row) if arguments.json else ROW.format(**row), flush=True)


if __name__ == "__main__":
    main()
