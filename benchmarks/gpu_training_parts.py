"""Parts of `gpu_training.py`: a random student, packs of random tokens, the plain loop, a profile."""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from operators import columns
from operators.train.config import TrainConfig
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore, pack_order, read_index
from operators.train.trainer import Trainer

BEGAN = time.monotonic()
WORDS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Sizes:
    """The device and the sizes of a measurement; `tokens` of a pack, `long` of a long pack."""

    device: str
    tokens: int
    long: int
    longest: int
    packs: int
    steps: int
    student: str
    small: str
    folder: str

    @property
    def on_gpu(self) -> float:
        return float(self.device == "cuda")


def say(phase: str, text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {phase:10} {text}", flush=True)


def make_student(folder: str, *, layers: int, width: int, vocabulary: int, heads: int, inner: int) -> str:
    """Write a random Llama with a tokenizer in bf16, with a quarter as many key heads as heads; returns `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    names = {"unk_token": WORDS[0], "bos_token": WORDS[1], "eos_token": WORDS[2]}
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, WORDS[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def packs_file(sizes: Sizes, tokens: int, documents: int, count: int, vocabulary: int) -> str:
    """`count` packs of `documents` documents of random tokens, of unequal lengths; the first token has no loss."""
    generator = torch.Generator().manual_seed(tokens + documents)
    rows = []
    for number in range(count):
        cuts = torch.randperm(tokens // 8 - 1, generator=generator)[: documents - 1].sort().values * 8 + 8
        lengths = [end - begin for begin, end in pairwise([0, *cuts.tolist(), tokens])]
        ids = torch.randint(5, vocabulary, (tokens,), generator=generator).tolist()
        labels, begin = list(ids), 0
        for length in lengths:
            labels[begin] = -100
            begin += length
        names = [f"{number}-{at}" for at in range(documents)]
        rows.append(
            {"input_ids": ids, "labels": labels, "document_lengths": lengths, "row_ids": names, "outcome": "packed"}
        )
    path = f"{sizes.folder}/packs-{tokens}-{documents}-{count}-{vocabulary}.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(columns.conform(table, columns.PACKS), path)
    return path


def job_of(sizes: Sizes, file: str, student: str = "", **options: Any) -> TrainJob:
    """A job of one worker, with bf16 and ZeRO-2 unless `options` change that."""
    options = {"precision": "bf16", "packs_per_step": sizes.packs, "max_steps": 1000, **options}
    config = TrainConfig(num_workers=1, gpus_per_worker=sizes.on_gpu, learning_rate=1e-4, seed=0, **options)
    return TrainJob(config, student or sizes.student, sizes.folder, [file], read_index([file]).digest, "benchmark")


def plain_losses(job: TrainJob, device: str) -> list[float]:
    store, config = PackStore(job.files), job.config
    order = pack_order(store.document_lengths, config)
    student = AutoModelForCausalLM.from_pretrained(job.student, dtype=torch.float32, attn_implementation="sdpa")
    student.to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for step in range(4):
        packs = order.packs_of(step)
        supervised, total = store.supervised_tokens(packs), 0.0
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step, config.max_steps)
        for index in packs:
            pack = store.pack(index)
            positions = torch.cat([torch.arange(length) for length in pack.document_lengths])[None].to(device)
            inputs = torch.tensor([pack.input_ids], device=device)
            logits = student(input_ids=inputs, position_ids=positions, use_cache=False).logits[0, :-1]
            labels = torch.tensor(pack.labels[1:], device=device)
            loss = cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def wait_for(sizes: Sizes) -> None:
    if sizes.on_gpu:
        torch.cuda.synchronize()


def print_profile(sizes: Sizes, job: TrainJob, engine: Any, noise: Any, name: str) -> None:
    """Print the kernels in which one step spends its time."""
    trainer = Trainer(job, engine, noise, PackStore(job.files))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if sizes.on_gpu else [])]
    wait_for(sizes)
    began = time.monotonic()
    with profile(activities=kinds) as found:
        trainer.step(1)
        wait_for(sizes)
    wall = time.monotonic() - began
    by = "self_device_time_total" if sizes.on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, by))
    if sizes.on_gpu:
        events = [event for event in events if event.device_type.name == "CUDA"]
    total = sum(getattr(event, by) for event in events)
    launches = sum(event.count for event in events)
    say("profile", f"{name}: {total / 1e3:.1f} ms in {launches} kernels, {wall * 1e3:.1f} ms by the wall, profiled")
    for event in events[:15]:
        spent = getattr(event, by)
        say("profile", f"{spent / 1e3:9.2f} ms {spent / total:6.1%} {event.count:6} x {event.key[:110]}")
    syncs = [event for event in found.key_averages() if "Synchronize" in event.key or event.key == "aten::item"]
    say("profile", "waits: " + ", ".join(f"{event.key} {event.count} x" for event in syncs))
