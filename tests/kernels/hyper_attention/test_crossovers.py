"""The table of lengths above which HyperAttention is faster, and the choice of the row for a call."""

from kernels.hyper_attention.crossovers import TABLE, crossover


def test_an_unknown_card_takes_the_longest_crossover_of_the_kind():
    for kind in {row.kind for row in TABLE}:
        longest = max(row.tokens for row in TABLE if row.kind == kind)
        assert crossover("sm_70", kind, 64, 1, True).tokens == longest


def test_a_head_size_between_two_takes_the_larger():
    sizes = sorted({row.head_size for row in TABLE if row.kind == "nominated" and row.architecture == "sm_90"})
    for size, row_size in ((16, sizes[0]), (sizes[0] + 1, sizes[-1]), (256, sizes[-1])):
        assert crossover("sm_90", "nominated", size, 4, True).head_size == row_size
