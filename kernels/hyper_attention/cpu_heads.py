"""The key heads of a batch, each on a thread of its own.

Heads write nothing in common, so their threads never wait for each other. Threads that share one operation, as torch's
do, meet at the end of each of thousands, and each time all wait for the slowest.

What is computed for a head does not depend on the number of threads, so neither does a bit of the result.

Shape letters: B batch, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head size.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST_HEAP_BLOCK = (1 << 25) - (1 << 16)  # bytes; glibc's limit, less its own header and padding


@dataclass(frozen=True)
class Head:
    """A key head of one row of the batch, with the query heads that read it; views, contiguous.

    Attributes:
        row: its row of the batch, in the plan's tables too.
        key: which key head it is.
        queries: its query heads.
        q: [G, T, D].
        k: [S, D].
        v: [S, D].
        out: [G, T, D], output so far, or of the whole softmax in the backward pass.
        lse: [G, T], its log-sum-exp.
        scale: factor of the logits.
    """

    row: int
    key: int
    queries: slice
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float

    def of_queries(self, x: Tensor) -> Tensor:
        """View [G, T, ...] of x [B, Hq, T, ...]."""
        return x[self.row, self.queries]

    def of_key(self, x: Tensor) -> Tensor:
        """View [S, ...] of x [B, Hk, S, ...]."""
        return x[self.row, self.key]


@dataclass(frozen=True)
class Gradients:
    """Gradients of a head: that of its output, [G, T, D], and those that are summed, of the shapes of q, k and v."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def heads_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> list[Head]:
    """The heads of q [B, Hq, T, D], k and v [B, Hk, S, D], out [B, Hq, T, D] and lse [B, Hq, T], all contiguous."""
    group = q.shape[1] // k.shape[1]
    return [
        Head(row, key, queries, q[row, queries], k[row, key], v[row, key], out[row, queries], lse[row, queries], scale)
        for row in range(k.shape[0])
        for key in range(k.shape[1])
        for queries in [slice(key * group, (key + 1) * group)]
    ]


def run_heads(work: Callable[[Head], None], heads: list[Head]) -> None:
    """Call `work` on each head; as many at once as the calling thread may use threads and cores.

    The last heads, too few for all threads, share them, one head after the other. What `work` raises is raised here.
    """
    _keep_freed_memory()
    threads = torch.get_num_threads()
    # A caller that OpenMP has bound to one core would have its new threads there too.
    at_once = min(threads, len(heads), len(os.sched_getaffinity(0)))
    even = len(heads) - len(heads) % at_once if at_once > 1 else 0
    if even:
        try:
            with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
                list(pool.map(torch.no_grad()(work), heads[:even]))
        finally:
            torch.set_num_threads(threads)  # the caller's did not change, but what threads born later begin with
    for head in heads[even:]:
        work(head)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of each thread's free memory.

    It keeps twice the size of the largest block that came from the system by itself and was freed, 32 MB at most
    (mallopt(3), M_MMAP_THRESHOLD). Until such a block is freed, what a head held goes back after each operation.
    """
    torch.empty(_LARGEST_HEAP_BLOCK, dtype=torch.uint8)
