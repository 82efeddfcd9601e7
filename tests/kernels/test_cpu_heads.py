"""Heads on threads: all are done, by as many threads as there are, and the caller's are left as they were."""

import threading

import pytest
import torch

from kernels.hyper_attention import cpu_heads
from kernels.hyper_attention.cpu_heads import heads_of, run_heads


def heads(B, Hq, Hk):
    q, k = torch.arange(B * Hq * 3.0).view(B, Hq, 3, 1), torch.arange(B * Hk * 3.0).view(B, Hk, 3, 1)
    return heads_of(q, k, k + 0.5, -q, -q[..., 0], 1.0)


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_heads.os, "sched_getaffinity", lambda _: range(4))
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_a_head_is_a_view_of_its_group():
    found = heads(2, 6, 2)
    assert [(head.row, head.key) for head in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    head = found[2]
    assert head.q.flatten().tolist() == list(range(18, 27))
    assert head.k.flatten().tolist() == [6, 7, 8]
    assert torch.equal(head.v, head.k + 0.5)
    assert torch.equal(head.out, -head.q)
    assert torch.equal(head.lse, head.out[..., 0])


@pytest.mark.parametrize(
    ("B", "Hk", "expected"),
    [
        (1, 1, {(0, 0): 4}),
        (1, 2, {(0, 0): 2, (0, 1): 2}),
        (1, 3, {(0, 0): 1, (0, 1): 1, (0, 2): 1}),
        (2, 3, {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 0): 1, (1, 1): 4, (1, 2): 4}),
    ],
)
def test_each_head_is_done_once_and_the_last_share_all_threads(B, Hk, expected, four_threads):
    done = []
    run_heads(lambda head: done.append((head.row, head.key, torch.get_num_threads())), heads(B, 4 * Hk, Hk))
    assert {(row, key): threads for row, key, threads in done} == expected
    assert len(done) == B * Hk


def test_heads_run_at_the_same_time(four_threads):
    all_here = threading.Barrier(4, timeout=60)
    run_heads(lambda head: all_here.wait(), heads(1, 4, 4))


def test_a_new_thread_of_the_caller_has_all_threads(four_threads):
    run_heads(lambda head: None, heads(1, 4, 4))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4]


def test_no_head_is_differentiated(four_threads):
    graded = []
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        run_heads(lambda head: graded.append((weight * head.q).requires_grad), heads(1, 4, 4))
    assert graded == [False] * 4


def test_an_error_of_a_head_is_the_callers(four_threads):
    def fail(head):
        if head.key == 1:
            raise ValueError("head 1")

    with pytest.raises(ValueError, match="head 1"):
        run_heads(fail, heads(1, 4, 4))


def test_a_bound_caller_keeps_its_core(four_threads, monkeypatch):
    monkeypatch.setattr(cpu_heads.os, "sched_getaffinity", lambda _: {3})
    found = []
    run_heads(lambda head: found.append(threading.current_thread()), heads(1, 4, 4))
    assert found == [threading.main_thread()] * 4
