"""Lengths from which HyperAttention is faster than torch's fastest exact attention, by card, mode and sizes.

`python benchmarks/gpu.py` measures both in one run on one card and prints the rows. An entry whose `measured` is empty
is expected, not measured.
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


_H100 = "2026-11-26, H100"
TABLE = (
    Crossover("sm_90", "means", 64, 1, True, 73_728, _H100),
    Crossover("sm_90", "means", 128, 1, True, 131_072, _H100),
    Crossover("sm_90", "paper causal", 64, 1, True, 46_080, _H100),
    Crossover("sm_90", "paper causal", 128, 1, True, 53_248, _H100),
    Crossover("sm_90", "paper full", 64, 1, True, 14_336, _H100),
    Crossover("sm_90", "paper full", 128, 1, True, 15_360, _H100),
    Crossover("sm_90", "nominated", 64, 1, True, 16_384, ""),
    Crossover("sm_90", "nominated", 128, 1, True, 16_384, ""),
)


def crossover(architecture: str, kind: str, head_size: int, group: int, training: bool) -> Crossover:
    """The row for a call: of the next larger head size, or the largest; the longest for cards not in the table."""
    rows = [row for row in TABLE if row.kind == kind] or list(TABLE)
    rows = [row for row in rows if row.architecture == architecture] or [max(rows, key=lambda row: row.tokens)]
    for wanted, field in ((training, "training"), (group, "group")):
        rows = [row for row in rows if getattr(row, field) == wanted] or rows
    sizes = {row.head_size for row in rows}
    size = min((size for size in sizes if size >= head_size), default=max(sizes))
    rows = [row for row in rows if row.head_size == size]
    return max(rows, key=lambda row: row.tokens)
