"""Training on one GPU: first compares losses with a plain torch loop, then measures speed, memory, noise, profile.

    python benchmarks/gpu_training.py [--smoke] [--seconds 225] [--only PHASE,..]

It takes four minutes. The project's own loop (operators/train: packs, attention by document, chunked loss, noise,
DeepSpeed) runs in this process, without Ray. The student is a random Llama of 0.82 billion weights in bf16 under
ZeRO-2, with eight packs of 4,096 tokens per step. `--smoke` runs every phase with a tiny student on the CPU. Each line
is complete by itself, so the output is useful even if a time limit cuts it off. If a phase fails, it says so, and the
exit code is 1.

It needs torch, Triton, transformers, pyarrow, deepspeed and pydantic; neither Ray nor a network.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOCAL_RANK", "0")
if "--smoke" in sys.argv:
    os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from gpu_training_parts import (
    BEGAN,
    Sizes,
    job_of,
    make_student,
    packs_file,
    plain_losses,
    print_profile,
    say,
    wait_for,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import operators.train.engine as engine_module
from operators.student.packed_attention import attention_in_use, packed_attention, set_documents
from operators.train.compiled import compile_layers
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore
from operators.train.throughput import model_cost, peak_flops
from operators.train.trainer import Trainer

FP32_LIMIT, BF16_LIMIT = 1e-4, 5e-3  # relative difference of losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--seconds", type=float, default=225, help="no phase begins later")
    parser.add_argument("--only", default="", help="phases, by commas")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, _process(arguments.smoke):
        sizes = _sizes(arguments.smoke, folder)
        phases: dict[str, Callable[[Sizes], None]] = {
            "gate": gate, "short": short, "compiled": compiled, "long": long, "attention": attention, "hyper": hyper,
        }  # fmt: skip
        for name, phase in phases.items():
            if arguments.only and name not in arguments.only.split(","):
                continue
            if time.monotonic() - BEGAN > arguments.seconds:
                say(name, "NOT RUN: time is up")
                failed += 1
                continue
            try:
                phase(sizes)
            except Exception:
                say(name, f"FAILED {' | '.join(traceback.format_exc().splitlines()[-8:])}"[:2000])
                failed += 1
                if name == "gate":
                    break
    say("end", f"{failed} phases failed")
    sys.exit(failed > 0)


@contextlib.contextmanager
def _process(smoke: bool) -> Iterator[None]:
    """Set this process up as the only worker."""
    if smoke:  # the same graphs, but without the C++ compiler
        engine_module.compile_layers = partial(compile_layers, backend="aot_eager")
    else:
        torch.cuda.set_device(0)
    backend = "gloo" if smoke else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    prepare_process(TrainConfig(gpus_per_worker=0 if smoke else 1))
    yield
    torch.distributed.destroy_process_group()


def _sizes(smoke: bool, folder: str) -> Sizes:
    small = make_student(f"{folder}/small", layers=2, width=128, vocabulary=2048, heads=4, inner=352)
    if smoke:
        say("machine", f"CPU, torch {torch.__version__}")
        return Sizes("cpu", 256, 512, 1024, 8, 2, small, small, folder)
    student = make_student(f"{folder}/student", layers=16, width=2048, vocabulary=49152, heads=32, inner=5632)
    name = torch.cuda.get_device_name()
    say("machine", f"{name}, torch {torch.__version__}, peak {(peak_flops('cuda') or 0) / 1e12:.0f} TFLOP/s")
    return Sizes("cuda", 4096, 32768, 131072, 8, 4, student, small, folder)


# ------------------------------------------------------------------------------------------------------ equal first


def gate(sizes: Sizes) -> None:
    """Compare the losses of four steps with a plain loop that uses a dense mask, for each variant."""
    file = packs_file(sizes, 512, 5, 8, 2048)
    plain = job_of(sizes, file, sizes.small, precision="fp32", neftune_alpha=0, packs_per_step=4)
    expected = plain_losses(plain, sizes.device)
    variants: dict[str, dict[str, Any]] = {
        "fp32": {"precision": "fp32"},
        "fp32, 4 packs per pass": {"precision": "fp32", "packs_per_pass": 4},
        "fp32, compiled": {"precision": "fp32", "packs_per_pass": 4, "compile": True},
        "bf16": {},
        "bf16, 4 packs per pass": {"packs_per_pass": 4},
        "bf16, recomputed": {"packs_per_pass": 4, "activation_checkpointing": True},
    }
    wrong = []
    for name, options in variants.items():
        job = job_of(sizes, file, sizes.small, neftune_alpha=0, **{"packs_per_step": 4, **options})
        with loaded(job) as (engine, noise):
            trainer = Trainer(job, engine, noise, PackStore(job.files))
            found = [trainer.step(step).loss for step in range(4)]
            way = attention_in_use(engine.module)
        apart = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
        good = apart <= (FP32_LIMIT if name.startswith("fp32") else BF16_LIMIT)
        say("gate", f"{name:22} losses {found[0]:.5f} to {found[-1]:.5f}, apart {apart:.1e}, {way}, {good}")
        wrong += [] if good else [name]
    if wrong:
        raise ValueError(f"losses differ from the plain loop's {expected}: {', '.join(wrong)}")


# ------------------------------------------------------------------------------------------------------------- speed


def measure(sizes: Sizes, phase: str, name: str, job: TrainJob, engine: Any, noise: Any, steps: int = 0) -> float:
    """Time whole optimizer steps, after one that is not timed; returns seconds per step."""
    steps = steps or sizes.steps
    trainer = Trainer(job, engine, noise, PackStore(job.files))
    trainer.step(0)
    wait_for(sizes)
    if sizes.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    found = [trainer.step(step) for step in range(1, 1 + steps)]
    wait_for(sizes)
    seconds = (time.monotonic() - began) / steps
    tokens, flops = found[0].tokens, found[0].model_flops
    per_token = model_cost(engine.module).per_token
    peak = peak_flops(sizes.device)
    shares = (
        f"MFU {per_token * tokens / seconds / peak:.1%} (6N), {flops / seconds / peak:.1%} with attention"
        if peak
        else "MFU unknown"
    )
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if sizes.on_gpu else "memory unknown"
    norm = found[-1].neft_l2
    say(
        phase,
        f"{name:32} {seconds * 1e3:8.1f} ms per step, {tokens / seconds:8.0f} tokens/s, {shares}, peak "
        f"{memory}, loss {found[-1].loss:.3f}, noise {'off' if norm is None else f'{norm:.5f}'}"
        f"{', '.join(['', *trainer.notes])}",
    )
    return seconds


def short(sizes: Sizes) -> None:
    """Packs of 4,096 tokens: one and eight documents, one and several packs per pass."""
    files = {documents: _short_packs(sizes, documents) for documents in (1, 8)}
    with loaded(job_of(sizes, files[1])) as (engine, noise):
        say("short", f"attention: {attention_in_use(engine.module)}")
        for documents, at_once in ((1, 1), (8, 1), (8, 4), (8, 8)):
            job = job_of(sizes, files[documents], packs_per_pass=at_once)
            measure(sizes, "short", f"{documents} documents, {at_once} packs per pass", job, engine, noise)
        print_profile(sizes, job_of(sizes, files[8], packs_per_pass=1), engine, noise, "8 documents, 1 pack per pass")


def compiled(sizes: Sizes) -> None:
    """The same with compiled layers; then without noise, for its cost."""
    file = _short_packs(sizes, 8)
    seconds = {}
    for alpha in (5.0, 0.0):
        job = job_of(sizes, file, packs_per_pass=4, compile=True, neftune_alpha=alpha)
        with loaded(job) as (engine, noise):
            name = f"compiled, 4 packs per pass, alpha {alpha:.0f}"
            seconds[alpha] = measure(sizes, "compiled", name, job, engine, noise)
            if alpha:
                for at_once in (1, 8):
                    other = job_of(sizes, file, packs_per_pass=at_once, compile=True)
                    measure(sizes, "compiled", f"compiled, {at_once} packs per pass", other, engine, noise)
                one = job_of(sizes, _short_packs(sizes, 1), packs_per_pass=4, compile=True)
                measure(sizes, "compiled", "compiled, 1 document, 4 packs", one, engine, noise)
                print_profile(sizes, job, engine, noise, "compiled, 8 documents, 4 packs per pass")
    say("compiled", f"NEFTune costs {seconds[5.0] / seconds[0.0] - 1:.2%} of a step")


def _short_packs(sizes: Sizes, documents: int) -> str:
    return packs_file(sizes, sizes.tokens, documents, sizes.packs * 2, 49000 if sizes.on_gpu else 2000)


def long(sizes: Sizes) -> None:
    """Packs of 32,768 tokens with recomputation: eight documents must take at most 0.6 of the time of one."""
    vocabulary, seconds = 49000 if sizes.on_gpu else 2000, {}
    files = {documents: packs_file(sizes, sizes.long, documents, 2, vocabulary) for documents in (1, 8)}
    options = {"packs_per_step": 1, "activation_checkpointing": True}
    for compiling in (True, False):
        with loaded(job_of(sizes, files[1], compile=compiling, **options)) as (engine, noise):
            for documents, file in files.items():
                job = job_of(sizes, file, compile=compiling, **options)
                name = f"{sizes.long} tokens, {documents} documents{', compiled' if compiling else ''}"
                seconds[documents] = measure(sizes, "long", name, job, engine, noise, steps=2)
        say("long", f"8 documents take {seconds[8] / seconds[1]:.3f} of the time of 1 document (aim 0.6)")


def hyper(sizes: Sizes) -> None:
    """HyperAttention on one long document of 32,768 and of 131,072 tokens."""
    for tokens in (sizes.long, sizes.longest):
        file = packs_file(sizes, tokens, 1, 2, 49000 if sizes.on_gpu else 2000)
        segment = max(64, tokens // 1024)
        options: dict[str, Any] = {
            "packs_per_step": 1, "activation_checkpointing": True, "attention": "hyper_attention",
            "hyper_attention": {"choice": "nominated", "segment": segment, "exact_below": 256 if sizes.on_gpu else 64},
        }  # fmt: skip
        job = job_of(sizes, file, **options)
        with loaded(job) as (engine, noise):
            measure(sizes, "hyper", f"nominated, {tokens} tokens", job, engine, noise, steps=1)


def attention(sizes: Sizes) -> None:
    """Attention of one layer alone, forward and backward: torch's choice, torch's other kernels, and ours."""
    for tokens in (4096, 32768) if sizes.on_gpu else ():
        q, k, v = (torch.randn(1, n, tokens, 64, device="cuda", dtype=torch.bfloat16) for n in (32, 8, 8))
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        exact = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                say("attention", f"{tokens:6} tokens, {backend or 'as torch chooses'}: {_timed(exact, inputs)}")
        module: Any = torch.nn.Identity()
        module.num_key_value_groups, module.is_causal = 4, True
        for documents in (2, 8):
            set_documents([tokens // documents] * documents)
            found = _timed(lambda *inputs, of=module: packed_attention(of, *inputs, None)[0], inputs)
            say("attention", f"{tokens:6} tokens, ours, {documents} documents: {found}")


def _timed(call: Callable[..., Any], inputs: list[torch.Tensor]) -> str:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.monotonic()
        torch.autograd.grad(call(*inputs).float().sum(), inputs)
        torch.cuda.synchronize()
        times.append((time.monotonic() - began) * 1e3)
    return f"{min(times[1:]):.2f} ms, first call {times[0]:.0f} ms"


if __name__ == "__main__":
    main()
