"""The contestants of training.py: each is a generator that takes one optimizer step and yields its loss.

A contestant runs in a process of its own, which takes a step when it is told to and says how long it took.
"""

import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from operators.student.encode import load_tokenizer
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore, pack_order
from operators.train.trainer import Trainer

Document = dict[str, list[int]]


class Contestant:
    """A generator of losses in a process of its own."""

    def __init__(self, threads: int, steps: Callable[..., Iterator[float]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, threads, steps, arguments))
        self._process.start()
        there.close()

    def step(self) -> tuple[float, float, float]:
        """The loss of the next step, its seconds, and the CPU seconds of all threads."""
        self._here.send(None)
        try:
            loss, seconds, cpu_seconds = self._here.recv()
        except EOFError:
            sys.exit("a contestant ended; its error is above")
        return loss, seconds, cpu_seconds

    def end(self) -> None:
        """Let the process end, and wait for it."""
        self._here.close()
        self._process.join()


def _serve(
    connection: Connection, threads: int, steps: Callable[..., Iterator[float]], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    losses = steps(*arguments)
    try:
        while True:
            connection.recv()
            wall, cpu = time.monotonic(), time.process_time()
            loss = next(losses)
            connection.send((loss, time.monotonic() - wall, time.process_time() - cpu))
    except EOFError:
        os._exit(0)  # whatever threads of a library are left
    except Exception:
        traceback.print_exc()
        os._exit(1)


def ours(job: TrainJob) -> Iterator[float]:
    """`operators.train`: DeepSpeed's engine, the checks and the metrics of each step."""
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    prepare_process(job.config)
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        for step in range(job.config.max_steps):
            yield trainer.step(step).loss


def plain(model: str, config: TrainConfig, file: str, by_document: bool) -> Iterator[float]:
    """What a careful person writes by hand: transformers and torch, no sharding, no checkpoints, no noise.

    With `by_document` it uses our attention and our loss, so that only the loop differs.
    """
    store = PackStore([file])
    order = pack_order(store.document_lengths, config)
    student = _student(model, config, by_document)
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
    for step in range(config.max_steps):
        packs, total = order.packs_of(step), 0.0
        supervised = store.supervised_tokens(packs)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, config.max_steps)
        for index in packs:
            pack = store.pack(index)
            if by_document:
                from operators.student.packed_loss import summed_loss

                loss = summed_loss(student, pack) / supervised
            else:
                loss = _masked_loss(student, pack) / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield total


def _student(model: str, config: TrainConfig, by_document: bool) -> Any:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if by_document:
        from operators.student.packed_loss import load_trainable

        return load_trainable(model, dtype)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").train()


def _masked_loss(student: Any, pack: Any) -> torch.Tensor:
    """sdpa with the dense mask that transformers makes of position ids; logits where there are labels."""
    positions = torch.cat([torch.arange(length) for length in pack.document_lengths])[None]
    inputs, labels = torch.tensor([pack.input_ids]), torch.tensor(pack.labels[1:])
    kept = (labels != -100).nonzero()[:, 0]
    logits = student(input_ids=inputs, position_ids=positions, use_cache=False, logits_to_keep=kept).logits[0]
    return cross_entropy(logits.float(), labels[kept], reduction="sum")


def trl(model: str, config: TrainConfig, file: str, folder: str, packed: bool) -> Iterator[float]:
    """TRL's SFTTrainer on the documents of our steps, in our order.

    Padded, as it is by default, the documents of a step are one batch. Packed (its strategy "bfd", padding-free), each
    pack is a batch, and a step accumulates as many as ours.
    """
    stepper = _Stepper()
    thread = threading.Thread(target=_train_trl, args=(model, config, file, folder, packed, stepper))
    thread.start()
    try:
        for _ in range(config.max_steps):
            stepper.go.put(None)
            found = stepper.done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stepper.go.put(None)
        thread.join()


class _Stepper(TrainerCallback):  # type: ignore[misc]
    """Holds the trainer back before each step, until the benchmark wants one."""

    def __init__(self) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[float | BaseException] = queue.Queue()

    def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:
        if "loss" in logs:
            self.done.put(float(logs["loss"]))
            self.go.get()


def _train_trl(model: str, config: TrainConfig, file: str, folder: str, packed: bool, stepper: _Stepper) -> None:
    try:
        torch.set_num_threads(config.threads_per_worker)  # of this thread
        trainer = _trl_trainer(model, config, file, folder, packed, stepper)
        stepper.go.get()
        trainer.train()
    except Exception as error:
        stepper.done.put(error)


def _trl_trainer(model: str, config: TrainConfig, file: str, folder: str, packed: bool, stepper: _Stepper) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    batches = _batches(config, file, packed)
    settings = SFTConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=max(map(len, batches)), max_steps=config.max_steps,
        gradient_accumulation_steps=config.packs_per_step if packed else 1, packing=False, padding_free=packed,
        max_length=None, learning_rate=config.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm, weight_decay=0.0,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=config.precision == "bf16", gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    rows = [document for batch in batches for document in batch]
    trainer = SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(model),
        callbacks=[stepper],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    ends = [sum(len(batch) for batch in batches[: at + 1]) for at in range(len(batches))]
    places = [list(range(end - len(batch), end)) for end, batch in zip(ends, batches, strict=True)]
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_sampler=places, collate_fn=trainer.data_collator)  # type: ignore[var-annotated]
    trainer.get_train_dataloader = lambda: loader
    return trainer


def _batches(config: TrainConfig, file: str, packed: bool) -> list[list[Document]]:
    store = PackStore([file])
    order, batches = pack_order(store.document_lengths, config), []
    for step in range(config.max_steps):
        packs = [_documents(store, index) for index in order.packs_of(step)]
        batches += packs if packed else [[document for pack in packs for document in pack]]
    return batches


def _documents(store: PackStore, index: int) -> list[Document]:
    pack, rows, begin = store.pack(index), [], 0
    for length in pack.document_lengths:
        tokens, labels = (part[begin : begin + length] for part in (pack.input_ids, pack.labels))
        rows.append({"input_ids": tokens, "labels": labels})
        begin += length
    return rows
