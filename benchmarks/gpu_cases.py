"""Checks of `gpu.py` before it times anything, against the reference in float64; and its inputs and timer."""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention, operator
from kernels.hyper_attention.documents import of_ids, whole
from kernels.hyper_attention.gpu.local import launches as local_launches
from kernels.hyper_attention.gpu.local.kept import sizes_of, views
from kernels.hyper_attention.gpu.paper import launches as paper_launches
from kernels.hyper_attention.plan.tables import build_plan
from kernels.hyper_attention.reference import reference_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 6e-3, FP16: 1e-3, FP32: 5e-6}
LOCAL = HyperAttentionConfig(
    mode="causal_local", choice="nominated", window=256, segment=32, lookback=512, exact_below=256
)
MEANS = replace(LOCAL, choice="means")
PAPER = HyperAttentionConfig(mode="paper", leaf=256, exact_below=256, num_samples=128, block_size=128)
WIDE = replace(PAPER, leaf=1000, block_size=100, num_samples=100)
LONG = [-1] * 5 + [0] * 433 + [1] * 10 + [2] * 300 + [3] * 40 + [4] * 507 + [-1] * 5
# By name: Hq, Hk, T, S, D, dtype, whether causal, configuration, documents.
CASES = {
    "nominated": (4, 2, 1300, 1300, 64, BF16, True, LOCAL, None),
    "nominated, packed": (4, 2, 1300, 1300, 64, BF16, True, LOCAL, LONG),
    "nominated, segments of 128": (2, 1, 1300, 1300, 64, BF16, True, replace(LOCAL, segment=128), None),
    "nominated, d = 128": (4, 2, 1300, 1300, 128, BF16, True, replace(LOCAL, segment=64), None),
    "nominated, d = 128, packed": (4, 2, 1300, 1300, 128, BF16, True, replace(LOCAL, segment=64), LONG),
    "nominated, prefix, d = 80": (2, 1, 700, 1001, 80, BF16, True, LOCAL, None),
    "nominated, fp16, d = 256": (2, 1, 900, 900, 256, FP16, True, LOCAL, None),
    "nominated, fp32": (2, 1, 900, 900, 64, FP32, True, LOCAL, None),
    "nominated, fp32, d = 32": (2, 1, 900, 900, 32, FP32, True, LOCAL, None),
    "nominated, fp32, d = 128": (2, 1, 900, 900, 128, FP32, True, LOCAL, None),
    "nominated, no look-back": (2, 2, 1300, 1300, 64, BF16, True, replace(LOCAL, lookback=0), None),
    "nominated, all exact, packed": (2, 1, 1300, 1300, 64, BF16, True, replace(LOCAL, exact_below=5000), LONG),
    "paper full": (4, 2, 1300, 1300, 64, BF16, False, PAPER, None),
    "paper full, fewer keys, d = 80": (2, 2, 1300, 900, 80, BF16, False, WIDE, None),
    "paper full, packed": (2, 1, 1300, 1300, 64, BF16, False, PAPER, LONG),
    "paper full, d = 128": (2, 1, 1300, 1300, 128, BF16, False, PAPER, None),
    "paper causal": (4, 2, 1300, 1300, 64, BF16, True, PAPER, None),
    "paper causal, packed": (2, 1, 1300, 1300, 64, BF16, True, PAPER, LONG),
    "paper causal, prefix": (2, 1, 700, 1001, 64, BF16, True, PAPER, None),
    "paper causal, d = 128": (2, 1, 1300, 1300, 128, BF16, True, PAPER, None),
    "paper causal, fp32": (2, 1, 900, 900, 64, FP32, True, PAPER, None),
    "paper causal, fp32, d = 128": (2, 1, 900, 900, 128, FP32, True, PAPER, None),
    "paper causal, fp16, d = 256": (2, 1, 900, 900, 256, FP16, True, PAPER, None),
    "means": (4, 2, 900, 900, 64, BF16, True, MEANS, None),
    "means, fp32, packed": (2, 1, 1300, 1300, 64, FP32, True, MEANS, LONG),
    "lsh": (4, 2, 900, 900, 64, BF16, True, replace(LOCAL, choice="lsh"), None),
}


def inputs(query_heads, key_heads, queries, keys, size, dtype, seed=0):
    """Random q, k, v and a gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((1, query_heads, queries, size), *((1, key_heads, keys, size),) * 2, (1, query_heads, queries, size))
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def smoothed(q):
    """Queries that change slowly (means over 256 tokens), so that lists are about as long as for text."""
    means = torch.nn.functional.avg_pool1d(q.flatten(0, 1).mT.float(), 256, 1, 128)[..., : q.shape[2]]
    return (means.mT.reshape(q.shape) * 16).to(q.dtype)


def listed(q, k, v, config):
    """Mean and largest number of entries of the lists of a call, as text."""
    config = replace(config, exact_below=256)
    *_, buffer = local_launches.forward(q, k, v, None, True, config, 0.125)
    counts = views(buffer, sizes_of(q, k, False, config), q.dtype).counts.float()
    return f"{counts.mean().item():.1f} of {int(counts.max())} segments of {config.segment}"


def correct(name):
    """Whether outputs and gradients of a case agree with the reference, and two runs give the same bits."""
    *shape, dtype, causal, config, documents = CASES[name]
    q, k, v, grad = inputs(*shape, dtype)
    ids = None if documents is None else torch.tensor([documents], device="cuda")
    begin = time.time()
    results = []
    for _ in range(2):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = hyper_attention(*tensors, causal, config=config, document_ids=ids, return_lse=True)
        results.append([out.detach(), *torch.autograd.grad((out.float() * grad.float()).sum(), tensors)])
    torch.cuda.synchronize()
    seconds = time.time() - begin
    plan = plan_of(q, k, v, ids, causal, config)
    tensors = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = reference_attention(*tensors, plan, q.shape[3] ** -0.5)
    truth = [out.detach(), *torch.autograd.grad((out * grad.double()).sum(), tensors)]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results[0], truth, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    good = same and all(error <= TOLERANCE[dtype] for error in errors)
    shown = " ".join(f"{error:.1e}" for error in errors)
    print(
        f"CORRECT {name} | {str(dtype)[6:]} | {q.shape[3]} | out, dq, dk, dv {shown} | same bits {same} | "
        f"{seconds:.0f} s | {'ok' if good else 'WRONG'}",
        flush=True,
    )
    return good


def timed(function, runs):
    """Median time of some runs in milliseconds."""
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
    """Two functions: the forward pass, and both passes."""

    def forward():
        with torch.no_grad():
            function(q, k, v)

    def both():
        torch.autograd.grad(function(q, k, v), (q, k, v), grad)

    return forward, both


def plan_of(q, k, v, ids, causal, config):
    """The plan with the kernels' own choices, because their logits may differ from torch's by rounding."""
    _, _, buffer = operator.forward(q, k, v, ids, causal, 1.0, config.to_json(), config.exact_limit)
    if config.mode == "paper":
        documents = whole(1, k.shape[2], k.device) if ids is None else of_ids(ids)
        call = paper_launches.call_of(q, k, v, causal, ids is not None, config, 1.0)
        kept = paper_launches.views(buffer, call.sizes)
        found = paper_launches.buckets(call, kept) if call.sizes.L else None
        return build_plan(q, k, causal, documents, config, found and tuple(x.int() for x in found))
    plan = operator.plan_of(q, k, ids, causal, config)
    sizes = sizes_of(q, k, ids is not None, config)
    if plan.lists is None or not sizes.C:
        return plan
    kept = views(buffer, sizes, k.dtype)
    some = torch.arange(kept.listed.shape[3], device="cuda") < kept.counts[..., None]
    segment = torch.where(some, kept.listed, plan.pooled.start.shape[1])
    lists = replace(plan.lists, segment=segment, first=torch.where(some, kept.firsts, plan.lists.tiles.size))
    return replace(plan, lists=lists)
