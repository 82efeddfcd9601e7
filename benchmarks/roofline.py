"""Lower bounds (floors) of the Triton path: bytes, FLOPs and exponentials over data-sheet rates; and measured times.

python benchmarks/roofline.py > docs/roofline.md
"""

import math
from dataclasses import dataclass

HEADS, ITEM = 32, 2  # bf16
BLOCK, SAMPLES, LEAF = 256, 256, 1024  # HyperAttentionConfig
# The same for choice "nominated": keys before a tile of 128 queries, sinks, keys of a full list, shortest segment.
WINDOW, TILE, SINKS, LISTED, SEGMENT = 512, 128, 4, 3072, 64
# Forward and backward together on an H100, ms, by d and n: `python benchmarks/gpu.py` on 2026-11-26, torch 2.11, Triton
# 3.6; exact attention is cuDNN's in the same run.
FORMS = ("exact, full", "paper, full", "exact, causal", "paper, causal", "nominated")
MEASURED = {
    (64, 32768): (67.0, 4.98, 35.0, 13.1, 16.1),
    (64, 131072): (1091, 17.9, 577, 67.2, 72.9),
    (128, 32768): (107, 7.80, 54.3, 23.6, 25.9),
    (128, 131072): (1746, 29.7, 917, 125, 122),
}
SIZES = [32768 << i for i in range(6)]
# FLOPs of a (query, key) pair in units of d: two products forward; five backward, or 3 + 4 if dQ has its own kernel.
FORWARD, FUSED_BACKWARD, DQ, DKV = 4, 10, 6, 8


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s, bytes/s and exponentials/s, all at their peak."""

    name: str
    flops: float
    bandwidth: float
    exponentials: float


# FLOPs and bandwidth: NVIDIA's data sheets (A100 80 GB SXM, H100 SXM, B200 SXM; dense, not sparse). Exponentials: 16 a
# clock and SM (CUDA C++ programming guide, arithmetic throughput) times SMs times boost clock.
GPUS = [
    Gpu("A100", 312e12, 2.039e12, 16 * 108 * 1.41e9),
    Gpu("H100", 989e12, 3.35e12, 16 * 132 * 1.83e9),
    Gpu("B200", 2250e12, 8.0e12, 16 * 148 * 1.85e9),
]


@dataclass(frozen=True)
class Launch:
    """A launch, for one head: rows of queries and keys that it reads, and pairs of them that it multiplies."""

    queries: float
    keys: float
    pairs: float
    first: bool = True
    last: bool = True


def exact(n, causal):
    return [Launch(n, n, n * (n + 1) / 2 if causal else n * n)]


def paper(n, causal):
    if not causal:
        return [Launch(n, n, n * (BLOCK + SAMPLES))]
    levels = int(math.log2(n // LEAF))
    # A level writes half of the rows in bf16, and the leaf reads them: four bytes per number.
    parts = [Launch(n / 2, n / 2, n / 2 * (BLOCK + SAMPLES), last=False) for _ in range(levels)]
    return [Launch(n, n, n * (LEAF + 1) / 2), *parts]


def nominated(n):
    segment = max(SEGMENT, n // 1024)
    near = WINDOW + TILE / 2 + segment / 2 + SINKS + n / segment / 2
    return [Launch(n, n + n / segment, n * (near + LISTED))]


def moved(launch, rows, total, tensors, d):
    """Bytes of `tensors` results: fp32 between launches, of `rows` rows; the last launch writes all `total`."""
    touched = total if launch.last else rows
    return tensors * d * touched * ((0 if launch.first else 4) + (ITEM if launch.last else 4))


def work(launch, stage, n, d, fused):
    """FLOPs, bytes and exponentials of a launch of one head."""
    inputs = ITEM * d * (launch.queries * (1 if stage == "forward" else 2) + 2 * launch.keys)
    tables = 8 * launch.queries + (0 if launch.first else 4 * (launch.queries + launch.keys))
    if stage == "forward":
        return FORWARD * d * launch.pairs, inputs + tables + moved(launch, launch.queries, n, 1, d), launch.pairs
    if stage == "dq":
        return DQ * d * launch.pairs, inputs + tables + moved(launch, launch.queries, n, 1, d), launch.pairs
    product = FUSED_BACKWARD if fused else DKV
    results = moved(launch, launch.keys, n, 2, d) + (moved(launch, n, n, 1, d) if fused else 0)
    return product * d * launch.pairs, inputs + tables + results, launch.pairs


def seconds(gpu, launches, n, d, fused):
    """Floors of forward and backward: launches run one after the other, and the slowest resource bounds each."""
    result = []
    for stages in (["forward"], ["dkv"] if fused else ["dq", "dkv"]):
        total = 0.0
        for stage in stages:
            for launch in launches:
                flops, size, exponentials = work(launch, stage, n, d, fused)
                total += HEADS * max(flops / gpu.flops, size / gpu.bandwidth, exponentials / gpu.exponentials)
        if stages != ["forward"]:
            total += HEADS * (2 * ITEM * d + 16) * n / gpu.bandwidth  # delta
        result.append(total)
    return result


def cell(times, base=None):
    shown = " + ".join(f"{1e3 * t:,.0f}" if t >= 0.1 else f"{1e3 * t:.3g}" for t in times)
    return shown if base is None else f"{shown} ({sum(base) / sum(times):.0f}x)"


def volumes(d):
    """GFLOP and GB of a forward and a backward pass at each n."""
    yield "| n | form | keys a query | GFLOP forward | GFLOP backward | GB forward | GB backward |"
    yield "|---:|---|---:|---:|---:|---:|---:|"
    for n in SIZES:
        forms = [("exact, full", exact(n, False)), ("paper, full", paper(n, False)), ("exact, causal", exact(n, True))]
        forms += [("paper, causal", paper(n, True)), ("nominated", nominated(n))]
        for name, launches in forms:
            fused = name.startswith("exact")
            stages = [["forward"], ["dkv"] if fused else ["dq", "dkv"]]
            sums = [
                [sum(work(x, stage, n, d, fused)[i] for x in launches for stage in group) * HEADS / 1e9 for i in (0, 1)]
                for group in stages
            ]
            keys = sum(x.pairs for x in launches) / n
            yield (
                f"| {n // 1024}k | {name} | {keys:,.0f} | {sums[0][0]:,.0f} | {sums[1][0]:,.0f} "
                f"| {sums[0][1]:,.1f} | {sums[1][1]:,.1f} |"
            )


def times(d):
    yield "| GPU | n | exact, full | paper, full | exact, causal | paper, causal | nominated |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for gpu in GPUS:
        for n in SIZES:
            full, causal = (seconds(gpu, exact(n, flag), n, d, fused=True) for flag in (False, True))
            cells = [cell(full), cell(seconds(gpu, paper(n, False), n, d, fused=False), full), cell(causal)]
            cells += [cell(seconds(gpu, x, n, d, fused=False), causal) for x in (paper(n, True), nominated(n))]
            yield f"| {gpu.name} | {n // 1024}k | {' | '.join(cells)} |"


def beside(d):
    """Floors for the H100, and times measured on one."""
    yield "| n | form | floor, ms | measured, ms | measured over floor |"
    yield "|---:|---|---:|---:|---:|"
    for (size, n), rows in MEASURED.items():
        forms = {"exact, full": exact(n, False), "paper, full": paper(n, False), "exact, causal": exact(n, True)}
        forms |= {"paper, causal": paper(n, True), "nominated": nominated(n)}
        for name, measured in zip(FORMS, rows, strict=True) if size == d else ():
            floor = 1e3 * sum(seconds(GPUS[1], forms[name], n, d, fused=name.startswith("exact")))
            yield f"| {n // 1024}k | {name} | {floor:,.3g} | {measured:,.4g} | {measured / floor:.1f} |"


HEAD = f"""# Roofline of the Triton path

Written by `python benchmarks/roofline.py > docs/roofline.md`. Floors (lower bounds) are computed; the times next to
them were measured on one H100 (2026-11-26). Nothing was run on an A100 or a B200.

The floor of a launch is the time that the slowest of three resources needs at the data sheet's peak: tensor cores,
memory, exponentials. Launches run one after the other. Real kernels do not reach it, exact attention neither:
FlashAttention-3's forward pass at d = 128 has 620 of an H100's 989 TFLOP/s (tritonbench). Each input row counts as read
once per launch, because tiles that share keys find them in the cache. Building the plan (hashing, sorting, nominating)
is not in the floors, but is in the measured times.

One sequence, {HEADS} heads for queries and keys, bf16. Paper: blocks {BLOCK}, samples {SAMPLES}, leaf {LEAF}.
nominated: window {WINDOW}, {SINKS} sinks, segments of max({SEGMENT}, n / 1024), lists at their cap of {LISTED} keys, as
random inputs have them; real text has shorter ones.
Our backward pass computes dQ and dK, dV in separate launches, with 7 products instead of 5, so that it needs no
atomics; exact attention is counted with 5.
"""


def main():
    print(HEAD)
    rates = "; ".join(
        f"{x.name} {x.flops / 1e12:.0f} TFLOP/s, {x.bandwidth / 1e12:.2f} TB/s, {x.exponentials / 1e12:.1f}e12 exp/s"
        for x in GPUS
    )
    print(f"Peaks: {rates}.\n")
    for d in (64, 128):
        print(f"## d = {d}: floors in ms, forward + backward (exact attention's sum over ours)\n")
        print("\n".join(times(d)), end="\n\n")
    for d in (64, 128):
        print(f"## d = {d}: an H100, measured times and floors, forward and backward together\n")
        print("\n".join(beside(d)), end="\n\n")
    for d in (64, 128):
        print(f"## d = {d}: work\n")
        print("\n".join(volumes(d)), end="\n\n" if d == 64 else "\n")


if __name__ == "__main__":
    main()
