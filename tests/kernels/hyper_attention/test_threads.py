"""Pieces on threads: all are computed, by all threads, and the caller's thread settings are restored."""

import threading

import pytest
import torch

from kernels.hyper_attention import threads
from kernels.hyper_attention.threads import in_threads


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(4))
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [(0, []), (1, [4]), (2, [2, 2]), (3, [1, 1, 1]), (4, [1, 1, 1, 1]), (6, [1, 1, 1, 1, 4, 4])],
)
def test_each_piece_is_done_once_and_the_last_share_all_threads(pieces, expected, four_threads):
    done = in_threads(lambda piece: (piece, torch.get_num_threads()), range(pieces))
    assert done == list(enumerate(expected))


def test_pieces_run_at_the_same_time(four_threads):
    all_here = threading.Barrier(4, timeout=60)
    in_threads(lambda _: all_here.wait(), range(4))


def test_a_new_thread_of_the_caller_has_all_threads(four_threads):
    in_threads(lambda _: None, range(4))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4]


def test_pieces_record_no_gradient(four_threads):
    weight = torch.ones(1, requires_grad=True)
    assert in_threads(lambda _: (weight * 2).requires_grad, range(5)) == [False] * 5


def test_pieces_write_what_the_caller_made_in_inference_mode(four_threads):
    with torch.inference_mode():
        made = torch.zeros(6)
        in_threads(lambda piece: made[piece].add_(piece), range(6))
    assert made.tolist() == list(range(6))
    assert made.is_inference()


def test_an_error_of_a_piece_is_raised_in_the_caller(four_threads):
    def fail(piece):
        if piece == 1:
            raise ValueError("piece 1")

    with pytest.raises(ValueError, match="piece 1"):
        in_threads(fail, range(4))


def test_a_bound_caller_keeps_its_core(four_threads, monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {3})
    found = in_threads(lambda _: threading.current_thread(), range(4))
    assert found == [threading.main_thread()] * 4
