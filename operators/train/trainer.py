"""One worker's optimizer steps and evaluations: it chooses packs and noise, and sums over all workers."""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from kernels.neftune import EmbeddingNoise, batch_of_pack, slice_of_batch
from operators.student.encode import IGNORED
from operators.student.packed_attention import BY_DOCUMENT, attention_in_use, masked_window
from operators.student.packed_documents import Pack, joined, padded, slice_of
from operators.student.packed_loss import summed_loss
from operators.student.slice_probe import has_dropout
from operators.train.config import TrainConfig
from operators.train.job import TrainJob
from operators.train.metrics import StepMetrics
from operators.train.noise import note_of
from operators.train.optimizer import set_rate
from operators.train.pack_order import PackStore, dummy_pack, pack_order
from operators.train.sequence_parallel import sequence_group
from operators.train.stopping import stop_is_asked
from operators.train.throughput import model_cost, peak_flops
from operators.train.validation import shared_documents, validation_packs, without_loss


class NotFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number; a restart would give the same."""


class Trainer:
    """One worker's engine, packs and their order."""

    def __init__(self, job: TrainJob, engine: Any, noise: EmbeddingNoise, store: PackStore) -> None:
        self._job, self._engine, self._noise, self._store = job, engine, noise, store
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._sequence = sequence_group(job.config.sequence_parallel)
        self._order = pack_order(store.document_lengths, job.config)
        self._dummy = dummy_pack(0)  # any token will do, because it has no loss; so no tokenizer is needed
        longest = max(map(max, store.document_lengths))
        self._packs_per_pass, note = packs_at_once(engine.module, job.config, longest)
        self._cost = model_cost(engine.module)
        self._peak = peak_flops(str(engine.device)) if job.config.precision == "bf16" else None
        kept_out = validation_packs(len(store), job.config)
        trained = sorted(set(range(len(store))) - set(kept_out))
        self._validation, self._quiet = kept_out, trained[: len(kept_out)]
        self._shared = shared_documents(store.row_ids, kept_out)
        shared = sum(map(len, self._shared.values()))
        text = f"{shared} documents do not count for the validation loss: other parts of their rows are trained on"
        sharing = f"sequence parallel over {self._sequence.size} workers" if self._sequence.size > 1 else ""
        found = (sharing, note, window_note(engine.module, longest), note_of(noise))
        self.notes = [*filter(None, found), *([text] if shared else [])]
        self.stop_asked = False  # the same on every worker
        self.heard: list[float] = []  # sums of what the workers had to say at the last step, the same on each
        self.total_steps = job.config.total_steps(self._order.steps_per_epoch)

    def step(self, step: int, say: Callable[[], Sequence[float]] = tuple) -> StepMetrics:
        """Do one optimizer step of all workers together.

        Args:
            step: its number, from 0.
            say: asked once, after the backward passes, for numbers of this worker; `heard` then has their sums over all
                workers. They travel with the sums of the loss, so that they cost no further exchange.

        Raises:
            NotFiniteError: the loss or its gradient is not a finite number, and nothing was updated.
        """
        started = time.monotonic()
        config, packs = self._job.config, self._order.packs_of(step)
        supervised = self._store.supervised_tokens(packs)
        rate = config.learning_rate_at(step, self.total_steps)
        set_rate(self._engine.optimizer.param_groups, rate, config)
        loss_sum, l2_sum, documents = self._accumulate(step, supervised, say)
        if not math.isfinite(loss_sum):
            raise NotFiniteError(
                f"train: loss at step {step} is {loss_sum}, and nothing was updated; lower train.learning_rate "
                f"({config.learning_rate}) or use train.precision: fp32"
            )
        norm = self._update(step, loss_sum / supervised)
        seconds, tokens = time.monotonic() - started, self._store.tokens(packs)
        flops = sum(self._cost.flops(self._store.document_lengths[index]) for index in packs)
        return StepMetrics(
            step=step,
            epoch=self._order.epoch(step),
            loss=loss_sum / supervised,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            supervised_tokens=supervised,
            examples=self._store.examples(packs),
            neft_l2=l2_sum / documents if documents else None,
            seconds=seconds,
            pid=os.getpid(),
            padded_tokens=self._padded_tokens(step),
            model_flops=flops,
            mfu=flops / seconds / (self._peak * self._world_size) if self._peak else None,
        )

    def _update(self, step: int, loss: float) -> float | None:
        """Update the weights, unless the gradient is not finite; returns its norm before clipping.

        ZeRO computes the norm inside its step, so it is checked where torch's optimizer is about to begin.
        """
        zero, seen = self._engine.optimizer, list[float | None]()

        def check(norm: Any) -> None:
            seen.append(None if norm is None else float(norm))
            if seen[0] is not None and not math.isfinite(seen[0]):
                raise NotFiniteError(
                    f"train: norm of the gradient at step {step} is {seen[0]} with a loss of {loss}, and nothing was "
                    f"updated; lower train.learning_rate ({self._job.config.learning_rate}) or use "
                    "train.precision: fp32"
                )

        def check_once(*_: object) -> None:
            if not seen:
                check(zero._global_grad_norm)

        if not self._job.config.sharding:  # DeepSpeed does not look at the norm then; it has averaged the gradients
            check(get_total_norm([each.grad for each in self._engine.module.parameters() if each.grad is not None]))
            self._engine.step()
            return seen[0]
        with zero.optimizer.register_step_pre_hook(check_once):
            self._engine.step()
        check_once()  # ZeRO may have left out the whole step
        return seen[0]

    def evaluate(self) -> dict[str, Any]:
        """Losses without noise on the packs that are kept out and on as many trained packs, over all workers.

        Raises:
            NotFiniteError: one of them is not a finite number.
        """
        found = {"validation_loss": self._mean_loss(self._validation), "quiet_loss": self._mean_loss(self._quiet)}
        for name, loss in found.items():
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"train: {name} is {loss}; lower train.learning_rate ({self._job.config.learning_rate}) or use "
                    "train.precision: fp32"
                )
        return found

    @torch.no_grad()
    def _mean_loss(self, indices: list[int]) -> float:
        """Mean loss in nats per supervised token; each worker reads equally many packs, some may be dummies."""
        device = str(self._engine.device)
        total, supervised = torch.zeros(2, dtype=torch.float64, device=device), 0
        self._engine.eval()
        number, count = self._sequence.number, self._sequence.count
        for place in range(number, -(-len(indices) // count) * count, count):
            pack = self._dummy
            if place < len(indices):
                pack = without_loss(self._store.pack(indices[place]), self._shared.get(indices[place], ()))
            supervised += sum(label != IGNORED for label in pack.labels) if self._sequence.place == 0 else 0
            total[0] += self._loss_of_slice(padded(pack, self._sequence.size), device).double()
        self._engine.train()
        total[1] += supervised
        dist.all_reduce(total)
        loss, tokens = total.tolist()
        return float(loss / tokens)

    def _passes(self, step: int, group: int) -> list[list[int]]:
        return self._order.passes(step, group, self._sequence.count, self._packs_per_pass)

    def _padded_tokens(self, step: int) -> int:
        """Tokens that all workers read in a step, with those of dummies and those that make slices equally long."""
        passes = (indices for group in range(self._sequence.count) for indices in self._passes(step, group))
        counts = (self._store.tokens(indices) or len(self._dummy.input_ids) for indices in passes)
        return sum(-(-count // self._sequence.size) * self._sequence.size for count in counts)

    def _loss_of_slice(self, pack: Pack, device: str) -> Tensor:
        return summed_loss(self._engine, pack, device, self._sequence.place, self._sequence.size)

    def _accumulate(self, step: int, supervised: int, say: Callable[[], Sequence[float]]) -> tuple[float, float, float]:
        """Run the forward and backward passes of a step.

        Returns the sums of loss and of noise norms, and the number of documents, over all workers. The host waits for
        the device only here, once, so that nothing is updated before the loss is known to be finite.
        """
        device = str(self._engine.device)
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        passes = self._passes(step, self._sequence.number)
        for place, indices in enumerate(passes):
            pack = padded(joined([self._store.pack(index) for index in indices] or [self._dummy]), self._sequence.size)
            last = place == len(passes) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            # Dropout, of adapters or the student, depends only on the pack, so it is the same on any number of workers.
            torch.manual_seed(_seed_of(self._job.config.seed, step, indices[0] if indices else None))
            tokens = len(pack.input_ids)
            batch = batch_of_pack(pack.document_lengths, pack.document_uids, tokens, self._order.epoch(step), device)
            self._noise.set_batch(slice_of_batch(batch, slice_of(tokens, self._sequence.place, self._sequence.size)))
            loss_sum = self._loss_of_slice(pack, device)
            # DeepSpeed averages gradients over the workers; the factor world size turns the mean into the sum.
            self._engine.backward(loss_sum * (self._world_size / supervised), scale_wrt_gas=False)
            l2, count = self._noise.l2_sum(self._sequence.add_others)
            totals[0] += loss_sum.detach().double()
            if self._sequence.place == 0:  # the norms and documents are those of the whole pack
                totals[1:3] += torch.stack([l2.double(), torch.full_like(l2, count).double()])
            if not last:
                self._engine.step()  # counts the micro-step
        stop = self._rank == 0 and stop_is_asked(Path(self._job.folder))
        totals = torch.cat([totals, torch.tensor([float(stop), *say()], dtype=totals.dtype, device=device)])
        dist.all_reduce(totals)
        loss_sum, l2_sum, documents, stops, *self.heard = totals.tolist()
        self.stop_asked = stops > 0
        return loss_sum, l2_sum, documents


def packs_at_once(model: Any, config: TrainConfig, longest: int) -> tuple[int, str]:
    """The number of packs of a forward pass, and why it is not the configured one; "" if it is.

    Args:
        model: the student.
        config: of the training.
        longest: tokens of the longest document.
    """
    if config.packs_per_pass == 1:
        return 1, ""
    if has_dropout(model):
        return 1, "train.packs_per_pass: packs were read one at a time, as dropout is a function of the pack"
    attention = attention_in_use(model)
    if attention not in (*BY_DOCUMENT, "hyper_attention"):
        return 1, f"train.packs_per_pass: packs were read one at a time, as attention {attention} masks a whole pass"
    if masked_window(model, longest):
        return 1, "train.packs_per_pass: packs were read one at a time, as layers with a window mask a whole pass"
    return config.packs_per_pass, ""


def window_note(model: Any, longest: int) -> str:
    """What the report says about layers that mask a whole pack because of their window; "" if there are none."""
    window, attention = masked_window(model, longest), attention_in_use(model)
    if not window or attention not in (*BY_DOCUMENT, "hyper_attention"):  # others always have a mask
        return ""
    cure = f"; with pack.max_tokens up to {window} they need none" if attention in BY_DOCUMENT else ""
    return (
        f"attention: {attention} only in layers without a window; those with a window of {window} tokens build a mask "
        f"of tokens x tokens over each pack, as the longest document has {longest} tokens{cure}"
    )


def _seed_of(seed: int, step: int, pack: int | None) -> int:
    return int(np.random.SeedSequence([seed, step, 0 if pack is None else pack]).generate_state(1, np.uint64)[0]) >> 1
