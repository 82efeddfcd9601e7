"""Memory and time of forward and backward passes over a long pack that several workers share, against one worker.

    benchmarks/sequence_parallel.py [--workers 1,2] [--tokens 16384] [--documents 1] [--attention sdpa,hyper_attention]

The model is a random Llama of four layers (hidden size 256, four heads, two of keys), in fp32 on CPUs with gloo. Each
worker has one thread. Memory is what the pass adds to a worker that has loaded the model: the kernel's peak of its
resident set, less what was resident before. It ends with an error if a loss differs from one worker's.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"

import torch
import torch.distributed as dist

from operators.student.packed_documents import Pack, padded
from operators.student.packed_loss import summed_loss
from operators.train.attention import configured_attention
from operators.train.config import TrainConfig
from operators.train.engine import load_student, prepare_process
from operators.train.memory import activation_bytes
from operators.train.sequence_parallel import sequence_group, shared_packs

LIMIT = 1e-5  # relative difference of losses
VOCABULARY = 512  # so small that logits take little memory
MIB = 1 << 20


def main() -> None:
    import deepspeed  # noqa: F401  # here once, and not in each worker, which is a fork of this process

    arguments = _arguments()
    torch.set_num_threads(1)
    print(_row("attention", "workers", "MiB a worker", "estimated", "seconds", "CPU s", "loss"))
    with tempfile.TemporaryDirectory() as folder:
        student, pack = _student(folder), _pack(arguments.tokens, arguments.documents)
        for attention in arguments.attention.split(","):
            expected = None
            for workers in map(int, arguments.workers.split(",")):
                config = TrainConfig(
                    num_workers=workers, sequence_parallel=workers, attention=attention, precision="fp32",
                    threads_per_worker=1, activation_checkpointing=arguments.recompute,
                )  # fmt: skip
                loss, added, seconds, cpu = _run(config, student, pack, f"{folder}/{attention}-{workers}")
                estimated = activation_bytes(student, config, arguments.tokens) / MIB
                figures = f"{added:,.0f}", f"{estimated:,.0f}", f"{seconds:.1f}", f"{cpu:.1f}", f"{loss:.4f}"
                print(_row(attention, workers, *figures), flush=True)
                expected = expected or loss
                if abs(loss - expected) > LIMIT * expected:
                    sys.exit(f"the loss of {workers} workers differs from {expected}")


def _row(*cells: object) -> str:
    return "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, (15, 8, 13, 10, 8, 8, 13), strict=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="1,2", help="the first is the reference")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--documents", type=int, default=1, help="of one length")
    parser.add_argument("--attention", default="sdpa,hyper_attention")
    parser.add_argument("--recompute", action="store_true", help="activations, in the backward pass")
    return parser.parse_args()


def _student(folder: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1 << 20, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(f"{folder}/student")
    return f"{folder}/student"


def _pack(tokens: int, documents: int) -> Pack:
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    length = tokens // documents
    lengths = [length] * (documents - 1) + [tokens - length * (documents - 1)]
    labels = [-100 if place % length == 0 else token for place, token in enumerate(ids)]
    return Pack(ids, labels, lengths, list(range(documents)))


def _run(config: TrainConfig, student: str, pack: Pack, address: str) -> tuple[float, float, float, float]:
    """Summed loss, largest MiB that the pass adds to a worker, its seconds, and CPU seconds of all workers."""
    fork = multiprocessing.get_context("fork")  # new processes that need not import everything again
    answers = fork.Queue()
    workers = range(config.num_workers)
    processes = [fork.Process(target=_part, args=(config, student, pack, rank, address, answers)) for rank in workers]
    for process in processes:
        process.start()
    losses, added, seconds, cpu = zip(*(answers.get(timeout=1800) for _ in workers), strict=True)
    for process in processes:
        process.join(300)
    return sum(losses), max(added), max(seconds), sum(cpu)


def _part(config: TrainConfig, student: str, pack: Pack, rank: int, address: str, answers: Any) -> None:
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=config.num_workers)
    prepare_process(config)
    size, model = config.sequence_parallel, load_student(student, config)
    sequence = sequence_group(size)
    with configured_attention(model, config), shared_packs(model, size):
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, started, began = _resident("VmRSS"), time.monotonic(), time.process_time()
        loss = summed_loss(model, padded(pack, size), "cpu", sequence.place, size)
        loss.backward()
        dist.barrier()
        seconds, cpu = time.monotonic() - started, time.process_time() - began
        answers.put((loss.item(), (_resident("VmHWM") - before) / MIB, seconds, cpu))
    answers.close()
    answers.join_thread()


def _resident(name: str) -> int:
    """Bytes of one of the kernel's figures about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
