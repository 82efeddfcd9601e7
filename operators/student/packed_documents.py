"""Packs: documents one after the other in one row, for training and its probes. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from operators.student.encode import IGNORED


@dataclass(frozen=True)
class Pack:
    """One pack, or a dummy without documents, which a worker reads if it has no pack left but other workers do.

    Attributes:
        input_ids: of all documents, one after the other, then padding, which is a document of its own in attention.
        labels: as many; -100 for tokens without loss and for the first token of each document.
        document_lengths: tokens of each document.
        document_uids: signed 64-bit identity of each.
    """

    input_ids: list[int]
    labels: list[int]
    document_lengths: list[int]
    document_uids: list[int]


def joined(packs: Sequence[Pack]) -> Pack:
    """Join several packs into one; dummies are left out unless all are dummies."""
    parts = [pack for pack in packs if pack.document_lengths] or list(packs[:1])
    return Pack(
        [token for pack in parts for token in pack.input_ids],
        [label for pack in parts for label in pack.labels],
        [length for pack in parts for length in pack.document_lengths],
        [uid for pack in parts for uid in pack.document_uids],
    )


def padded(pack: Pack, multiple: int) -> Pack:
    """Add padding without loss until `multiple` divides the number of tokens."""
    missing = -len(pack.input_ids) % multiple
    tokens, labels = [*pack.input_ids, *pack.input_ids[:1] * missing], [*pack.labels, *[IGNORED] * missing]
    return replace(pack, input_ids=tokens, labels=labels)


def slice_of(tokens: int, place: int, count: int) -> slice:
    """The tokens of slice `place` if a pack of `tokens` tokens is cut into `count` slices of one length."""
    length = tokens // count
    return slice(place * length, (place + 1) * length)
