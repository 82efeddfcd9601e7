"""Lengths from which HyperAttention is faster than torch's fastest exact attention, by card, mode and sizes.

`python benchmarks/gpu.py times` measures both in one run on one card, at 8,192, 16,384 and 32,768 tokens among others.
Its random inputs fill the lists of "nominated" more than any text does. Lengths between those are interpolated, log
over log, and rounded up to 1,024. An entry whose `measured` is empty is expected, not measured.
"""

from typing import NamedTuple


class Crossover(NamedTuple):
    """One row of the table.

    Attributes:
        architecture: "sm_90" and the like.
        kind: "nominated", "means", "lsh", "paper causal" or "paper full".
        head_size: D.
        group: query heads of a key head.
        training: forward and backward, or the forward pass alone.
        tokens: documents of at most so many tokens are faster with exact attention.
        measured: date and card; empty: expected.
    """

    architecture: str
    kind: str
    head_size: int
    group: int
    training: bool
    tokens: int
    measured: str


_H100 = "2026-11-26 on an H100, torch 2.11, Triton 3.6"
_NEVER = 1 << 40
TABLE = (
    Crossover("sm_90", "nominated", 64, 1, True, 13_312, _H100),
    Crossover("sm_90", "nominated", 128, 1, True, 14_336, _H100),
    Crossover("sm_90", "nominated", 64, 1, False, 14_336, _H100),
    Crossover("sm_90", "nominated", 128, 1, False, 18_432, _H100),
    Crossover("sm_90", "paper causal", 64, 1, True, 12_288, _H100),
    Crossover("sm_90", "paper causal", 128, 1, True, 12_288, _H100),
    Crossover("sm_90", "paper causal", 64, 1, False, 13_312, _H100),
    Crossover("sm_90", "paper causal", 128, 1, False, 16_384, _H100),
    # Faster at 8,192 tokens already; shorter ones were not measured.
    Crossover("sm_90", "paper full", 64, 1, True, 8_191, _H100),
    Crossover("sm_90", "paper full", 128, 1, True, 8_191, _H100),
    Crossover("sm_90", "paper full", 64, 1, False, 8_191, _H100),
    Crossover("sm_90", "paper full", 128, 1, False, 8_191, _H100),
    # Yardsticks without a fast kernel: exact attention is faster at every length.
    Crossover("sm_90", "means", 64, 1, True, _NEVER, ""),
    Crossover("sm_90", "lsh", 64, 1, True, _NEVER, ""),
)


def crossover(architecture: str, kind: str, head_size: int, group: int, training: bool) -> Crossover:
    """The row for a call: that of the next larger head size, else of the largest.

    For a card that the table lacks, the row with the most tokens.
    """
    rows = [row for row in TABLE if row.kind == kind] or list(TABLE)
    rows = [row for row in rows if row.architecture == architecture] or [max(rows, key=lambda row: row.tokens)]
    for wanted, field in ((training, "training"), (group, "group")):
        rows = [row for row in rows if getattr(row, field) == wanted] or rows
    sizes = {row.head_size for row in rows}
    size = min((size for size in sizes if size >= head_size), default=max(sizes))
    rows = [row for row in rows if row.head_size == size]
    return max(rows, key=lambda row: row.tokens)
