"""Work in independent pieces, each on a thread of its own.

Pieces write nothing in common, so their threads never wait for each other. torch's own threads share each operation:
they meet at the end of each of thousands, and each time all wait for the slowest.

What is computed for a piece does not depend on the number of threads, so the result is the same, bit for bit.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")
_LARGEST_HEAP_BLOCK = (1 << 25) - (1 << 16)  # bytes; glibc's limit, less its own header and padding


def in_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """The result of `work` for each piece; it runs on as many at once as the calling thread may use threads and cores.

    Pieces left over, too few for all threads, run one after the other, each with all threads. Errors of `work` are
    raised here. Nothing is differentiated.
    """
    _keep_freed_memory()
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    # If OpenMP has bound the caller to one core, new threads would share that core.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    at_once = min(threads, len(pieces), cores)
    even = len(pieces) - len(pieces) % at_once if at_once > 1 else 0

    def ungraded(piece: Piece) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(piece)

    results: list[Result] = []
    if even:
        try:
            with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,)) as pool:
                results += pool.map(ungraded, pieces[:even])
        finally:
            torch.set_num_threads(threads)  # the workers changed the default of all threads that start later
    return results + [ungraded(piece) for piece in pieces[even:]]


def each_on(device: torch.device, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """`in_threads` on a CPU; on other devices, where calls only queue work, one piece after the other."""
    return in_threads(work, pieces) if device.type == "cpu" else [work(piece) for piece in pieces]


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of each thread's free memory.

    glibc keeps twice the size of the largest block that it got from the system by mmap and freed, with 32 MB at most
    for that block (mallopt(3), M_MMAP_THRESHOLD). Until such a block was freed, it returns the memory of a head to the
    system after each operation.
    """
    torch.empty(_LARGEST_HEAP_BLOCK, dtype=torch.uint8)
