"""Packs that are read as one."""

from operators.student.packed_documents import Pack, joined, padded, slice_of

ONE, OTHER, DUMMY = (
    Pack([1, 2, 3], [-100, 2, 3], [2, 1], [7, 8]),
    Pack([4], [-100], [1], [9]),
    Pack([0], [-100], [], []),
)


def test_packs_are_joined_in_their_order_and_dummies_leave_no_trace():
    assert joined([ONE, DUMMY, OTHER]) == Pack([1, 2, 3, 4], [-100, 2, 3, -100], [2, 1, 1], [7, 8, 9])
    assert joined([DUMMY]) == DUMMY


def test_padding_has_no_loss_and_belongs_to_no_document():
    assert padded(ONE, 3) == ONE
    assert padded(ONE, 4) == Pack([1, 2, 3, 1], [-100, 2, 3, -100], [2, 1], [7, 8])
    assert padded(DUMMY, 4) == Pack([0] * 4, [-100] * 4, [], [])


def test_slices_cover_a_pack():
    tokens = list(range(12))
    assert [token for place in range(4) for token in tokens[slice_of(12, place, 4)]] == tokens
