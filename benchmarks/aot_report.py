"""What the Triton kernels become on GPUs that are not here: compiled ahead of time and counted, not timed.

    python benchmarks/aot_report.py > docs/aot.md                       # all: many minutes
    python benchmarks/aot_report.py --targets sm_90 --sizes 64 --json   # one line of JSON for each kernel

The launches of a forward and a backward pass are those of the library, with its committed tiles, arguments and
alignments: only the driver is replaced, by one that names the target and runs nothing. Kernels are listed once for each
set of parts they are compiled for.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import whole
from kernels.hyper_attention.gpu import attention as gpu_attention
from kernels.hyper_attention.gpu import parts, tuning
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.tables import build_plan

# Shared memory of a block in KB, at most: CUDA C programming guide, table of compute capabilities; AMD CDNA3 ISA, LDS.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
MODES = ("paper", "causal_local")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"block_size": 256, "num_samples": 256, "leaf": 256, "window": 256, "exact_below": 256, "lookback": 512}


class Driver:
    """Stands for a GPU of one target."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def compiled(name, head_size, dtype, modes, chosen):
    """Compile the launches of the modes; yields (mode, label, kernel)."""
    kernels, label = [], []
    run, launch = JITFunction.run, tuning.launch

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels.append((mode, label[-1] if label else self.fn.__name__.removesuffix("_kernel"), kernel))

    def labelled(name, part, *arguments, **options):
        label.append(f"{name}, {part}")
        launch(name, part, *arguments, **options)
        label.pop()

    tuning.architecture = lambda device: name
    gpu_attention.launch, JITFunction.run = labelled, compile_only
    driver.set_active(Driver(TARGETS[name][0]))
    for value in [*vars(tuning)["_KERNELS"].values(), gpu_attention.delta_kernel, parts.pool_kernel]:
        value.device_caches.clear()
    for mode in modes:
        label.append("")
        q, k, v = (torch.zeros(1, heads, 1024, head_size, dtype=dtype) for heads in (4, 2, 2))
        config = HyperAttentionConfig(mode=mode, segment=SIZES["lookback"] // chosen, **SIZES)
        tokens = whole(1, 1024, q.device)
        plan = build_plan(q, k, True, tokens, config) if mode == "paper" else build_local_plan(q, k, tokens, config)
        label.pop()
        out, lse = gpu_attention.forward(q, k, v, plan, 0.1)
        gpu_attention.backward(q, lse, q, k, v, out, lse, plan, 0.1)
    JITFunction.run, gpu_attention.launch = run, launch
    seen = set()
    for mode, key, kernel in kernels:
        if (key, kernel.hash) not in seen:
            seen.add((key, kernel.hash))
            yield mode, key, kernel


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
        "copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", text)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", text)),
    }


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    # A program of the installed wheel, on our file.
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout  # noqa: S603


HEAD = """# The Triton kernels, compiled ahead of time

Written by `python benchmarks/aot_report.py {command}`. **Compiled and counted, not timed: no GPU was at hand.**

The launches of a forward and a backward pass, {dtype}, with the committed tiles; Triton {version}. A kernel is listed
twice where the last launch, which writes every row, is compiled apart; in `causal_local`, "local" reads means and sinks
too. Stack: bytes that are reserved. Spills: vector registers, and instructions, that go to it. Lanes: scalar registers
of gfx942 that are kept in lanes of vector registers, not in memory. Shared: KB of a block / the target's limit. Tensor
cores: matrix instructions ({cores}).
Copies: asynchronous, from global to shared memory; gfx942, of one stage, has none.

{chosen} chosen segments a query (`--chosen`): the default configuration has sixteen, configs/long_context.yaml eight.

| kernel | mode | d | target | registers | stack | spills | lanes | shared | tensor cores | copies | atomics |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"""
ROW = """| {kernel} | {mode} | {d} | {target} | {registers} | {stack} | {spills} | {lanes} \
| {shared_kb:.0f} / {limit_kb} | {tensor_cores} | {copies} | {atomics} |"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--chosen", type=int, default=16, help="segments that a query of causal_local reads exactly")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    arguments = parser.parse_args()
    if not arguments.json:
        cores, command = ", ".join(f"{TENSOR_CORES[x]} on {x}" for x in arguments.targets), " ".join(sys.argv[1:])
        command = f"{command} > docs/aot.md".strip()
        print(
            HEAD.format(
                command=command, dtype=arguments.dtype, version=triton.__version__, cores=cores, chosen=arguments.chosen
            )
        )
    for name in arguments.targets:
        for size in arguments.sizes:
            for mode, label, kernel in compiled(name, size, DTYPES[arguments.dtype], arguments.modes, arguments.chosen):
                row = counts(kernel, name)
                row |= {"kernel": label, "mode": mode, "d": size, "target": name, "limit_kb": TARGETS[name][1]}
                print(json.dumps(row) if arguments.json else ROW.format(**row), flush=True)


if __name__ == "__main__":
    main()
