"""Losses on packs that are not trained on, while training runs: which weights are the best, and when to stop.

The packs are taken out of the training data; a part of a split row does not count where another part of it is
trained on. The rows that `evaluation` and `release` look at play no part here:
a student that was chosen by them would look better on them than it is.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from operators.student.encode import IGNORED
from operators.student.packed_loss import Pack
from operators.train.config import TrainConfig
from operators.train.overlong import row_of

_STREAM = 1 << 20  # of random numbers, apart from those of the epochs


def validation_packs(num_packs: int, config: TrainConfig) -> list[int]:
    """Indices of the packs that are kept out of training, sorted; none where nothing is evaluated.

    Raises:
        ValueError: nothing would be left to train on.
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
    """By kept-out pack, the places of its documents that are parts of a row of which another part is trained on.

    Args:
        row_ids: ids of the documents of each pack.
        kept_out: indices of the packs that are kept out of training.

    Raises:
        ValueError: nothing else is kept out, so there is nothing to measure.
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
    """The pack with no loss on some of its documents, by their places."""
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
    """What was measured so far, also by attempts before this one."""

    def __init__(self, patience: int, found: Iterable[Evaluated] = ()) -> None:
        """
        Args:
            patience: evaluations without a better loss until training stops; 0 never stops.
            found: earlier evaluations of this run.
        """
        self._patience, self._found = patience, list(found)

    @property
    def best(self) -> Evaluated | None:
        """The lowest loss, the earliest of equal ones; None before the first evaluation."""
        return min(self._found, key=lambda one: (one.loss, one.step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations were all no better than the best before them."""
        if not self._patience or self.best is None:
            return False
        return len(self._found) - 1 - self._found.index(self.best) >= self._patience

    def add(self, step: int, loss: float) -> bool:
        """Note an evaluation; true if it is the best so far."""
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
