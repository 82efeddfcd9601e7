"""Packs that are read as one."""

from operators.student.packed_documents import Pack, joined

ONE, OTHER, DUMMY = (
    Pack([1, 2, 3], [-100, 2, 3], [2, 1], [7, 8]),
    Pack([4], [-100], [1], [9]),
    Pack([0], [-100], [], []),
)


def test_packs_are_joined_in_their_order_and_dummies_leave_no_trace():
    assert joined([ONE, DUMMY, OTHER]) == Pack([1, 2, 3, 4], [-100, 2, 3, -100], [2, 1, 1], [7, 8, 9])
    assert joined([DUMMY]) == DUMMY
