"""Losses on packs that are kept out of training: they decide which weights are the best, and when to stop.

The packs come from the training data. A part of a split row does not count if another part of it is trained on. The
held-out rows of `evaluation` and `release` are not used here: a student that was chosen by its loss on them would look
better on them than it is.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from operators.student.encode import IGNORED
from operators.student.packed_documents import Pack
from operators.train.config import TrainConfig
from operators.train.overlong import row_of

_STREAM = 1 << 20  # a stream of random numbers different from those of the epochs


def validation_packs(num_packs: int, config: TrainConfig) -> list[int]:
    """Indices of the packs that are kept out of training, sorted; empty if nothing is evaluated.

    Raises:
        ValueError: no pack would be left for training.
    """
    if not config.evaluate_every_steps:
        return []
    count = max(1, round(config.validation_share * num_packs))
    if count >= num_packs:
        raise ValueError(
            f"train: train.evaluate_every_steps needs {count} of {num_packs} packs for validation and leaves none; "
            "lower pack.max_tokens or train.validation_share, or set train.evaluate_every_steps to 0"
        )
    order = np.random.default_rng([config.seed, _STREAM]).permutation(num_packs)
    return sorted(int(index) for index in order[:count])


def shared_documents(row_ids: Sequence[Sequence[str]], kept_out: Collection[int]) -> dict[int, list[int]]:
    """Kept-out pack -> the places of its documents that belong to a row of which another part is trained on.

    Args:
        row_ids: ids of the documents of each pack.
        kept_out: indices of the packs that are kept out of training.

    Raises:
        ValueError: all documents of the kept-out packs are such parts, so there is nothing to measure.
    """
    kept = set(kept_out)
    trained = {row_of(row_id) for index, ids in enumerate(row_ids) if index not in kept for row_id in ids}
    shared = {
        index: [place for place, row_id in enumerate(row_ids[index]) if row_of(row_id) in trained] for index in kept
    }
    if kept and all(len(places) == len(row_ids[index]) for index, places in shared.items()):
        raise ValueError(
            f"train: each of the {len(kept)} packs for validation holds only parts of rows that are trained on; raise "
            "pack.max_tokens or train.validation_share, set pack.overlong to truncate, or evaluate_every_steps to 0"
        )
    return shared


def without_loss(pack: Pack, documents: Collection[int]) -> Pack:
    """The pack without loss on the documents at these places."""
    if not documents:
        return pack
    labels, begin = list(pack.labels), 0
    for place, length in enumerate(pack.document_lengths):
        if place in documents:
            labels[begin : begin + length] = [IGNORED] * length
        begin += length
    return replace(pack, labels=labels)


@dataclass(frozen=True)
class Evaluated:
    """The loss after `step` finished steps, in nats per supervised token, without noise."""

    step: int
    loss: float


class History:
    """The evaluations so far, including those of earlier attempts."""

    def __init__(self, patience: int, found: Iterable[Evaluated] = ()) -> None:
        """
        Args:
            patience: evaluations without a better loss until training stops; 0 never stops.
            found: earlier evaluations of this run.
        """
        self._patience, self._found = patience, list(found)

    @property
    def best(self) -> Evaluated | None:
        """The evaluation with the lowest loss, the earliest of equal ones; None before the first evaluation."""
        return min(self._found, key=lambda one: (one.loss, one.step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether none of the last `patience` evaluations was better than the best before them."""
        if not self._patience or self.best is None:
            return False
        return len(self._found) - 1 - self._found.index(self.best) >= self._patience

    def add(self, step: int, loss: float) -> bool:
        """Add an evaluation; returns whether it is the best so far."""
        self._found.append(Evaluated(step, loss))
        return self.best == self._found[-1]


def history_of(lines: Sequence[dict[str, Any]], patience: int, start: int) -> History:
    """The evaluations in the lines of metrics.jsonl before `start`."""
    found = [
        Evaluated(line["step"] + 1, line["validation_loss"])
        for line in lines
        if line["step"] < start and line.get("validation_loss") is not None
    ]
    return History(patience, found)
