"""Times a few tiles of each Triton kernel, one after another: `python benchmarks/gpu.py tune`.

Each is compiled in a process of its own before anything is timed. The time of a kernel is its device time in a whole
forward and backward pass.
"""

import json
import re

from kernels.hyper_attention.gpu.local import launches as local_launches
from kernels.hyper_attention.gpu.local import tiles
from kernels.hyper_attention.gpu.paper import launches as paper_launches

_QUERIES = ((64, 64, 4, 3), (128, 64, 8, 3))
_KEYS = ((32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2))
TUNED = {
    "nominate": ((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    "attend": _QUERIES,
    "query_gradient": _QUERIES,
    "mean_gradient": ((64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 1)),
    "key_gradient": _KEYS,
    "level": ((128, 64, 4, 3), *_QUERIES),
    "leaf": _QUERIES,
    "level_query_gradient": ((128, 64, 4, 3), *_QUERIES),
    "leaf_query_gradient": _QUERIES,
    "draw_gradient": (*_KEYS, (32, 64, 4, 5)),
    "level_key_gradient": _KEYS,
    "leaf_key_gradient": _KEYS,
}


def override(kernel, tile):
    """Use one tile for a kernel, for all sizes."""
    found = tiles.tile_of
    chosen = tiles.Tile(*tile)
    for module in (local_launches, paper_launches):
        module.tile_of = lambda device, name, *rest: chosen if name == kernel else found(device, name, *rest)


def compilations(sizes, tokens, part):
    """Arguments of `gpu.py` for each kernel whose name has the pattern, each of its tiles and each head size."""
    return [
        ["--compile", str(size), str(tokens), kernel, json.dumps(tile), kind_of(kernel)]
        for size in sizes
        for kernel, found in TUNED.items()
        if re.search(part, kernel)
        for tile in found
    ]


def kind_of(kernel):
    """The kind of call in which a kernel is tuned."""
    return "paper causal" if kernel.startswith(("level", "leaf", "draw")) else "nominated"


def tune(size, tokens, part, step, launches_of):
    """Print the milliseconds of each kernel with each of its tiles."""
    for kernel, choices in TUNED.items():
        if not re.search(part, kernel):
            continue
        both = step(size, tokens, kind_of(kernel))
        for tile in choices:
            override(kernel, tile)
            try:
                both()
                _, found = launches_of(both)
            except Exception as error:
                print(f"TUNE {kernel} | {size} | {tile} | FAILED {str(error)[:120]}", flush=True)
                continue
            spent = sum(value for name, value in found.items() if name.startswith(f"{kernel}_kernel"))
            print(f"TUNE {kernel} | {size} | {tokens} | {tile} | {spent:.3f} ms", flush=True)
        local_launches.tile_of = paper_launches.tile_of = tiles.tile_of
