"""Sizes of the tiles of mode "causal_local", by architecture, kernel and bytes of a row.

Those of sm_90 are the fastest of a few that `python benchmarks/gpu.py tune` timed at 131,072 tokens on an H100
(2026-11-26, Triton 3.6) for d = 64 and 128 in bf16; the others follow by analogy and were not timed.
"""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its loops."""

    BM: int
    BN: int
    warps: int
    stages: int


KERNELS = (
    "nominate", "attend", "query_gradient", "mean_gradient", "key_gradient",
    "level", "leaf", "level_query_gradient", "leaf_query_gradient", "draw_gradient", "level_key_gradient",
    "leaf_key_gradient",
)  # fmt: skip
# By kernel; then for rows of at most 128, 256 and 512 bytes: d = 64, 128 and 256 in bf16. A tile of 64 rows has four
# warps: eight would compute every product twice.
TILES: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "sm_90": {
        "nominate": (Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 32, 4, 2)),
        "attend": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "query_gradient": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "mean_gradient": (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 1)),
        "key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 3), Tile(32, 64, 4, 1)),
        "level": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "leaf": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "level_query_gradient": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "leaf_query_gradient": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        "draw_gradient": (Tile(32, 64, 4, 3), Tile(32, 64, 4, 5), Tile(32, 64, 4, 1)),
        "level_key_gradient": (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 1)),
        "leaf_key_gradient": (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 1)),
    },
    "sm_80": {
        "nominate": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        "attend": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        "query_gradient": (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        "mean_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
        "key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
        "level": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        "leaf": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        "level_query_gradient": (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        "leaf_query_gradient": (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        "draw_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
        "level_key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
        "leaf_key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
    },
    # For Triton's interpreter on a CPU: a tile of queries has several parts, so that tests cover this case.
    "none": dict.fromkeys(KERNELS, (Tile(16, 16, 4, 1),) * 3),
}
# fp32 is for tests: tiles of at most 32 rows use mma.sync, not wgmma, whose descriptors ptxas 12.8 builds wrongly.
_WIDE = {
    name: Tile(16, 32, 4, 1) for name in KERNELS if name.endswith(("mean_gradient", "key_gradient", "draw_gradient"))
}


def tile_of(device: torch.device, kernel: str, row_bytes: int, wide: bool = False) -> Tile:
    """The committed tile of a kernel.

    Args:
        device: of the tensors.
        kernel: one of KERNELS.
        row_bytes: bytes of a row of q, padded to a power of two.
        wide: whether the dtype is fp32.
    """
    name = architecture(device)
    if wide and name != "none":
        return _WIDE.get(kernel, Tile(32, 32, 4, 1)) if row_bytes <= 512 else Tile(16, 16, 4, 1)
    width = max(0, (row_bytes - 1).bit_length() - 7)
    return TILES[name][kernel][min(width, 2)]


def padded(head_size: int) -> int:
    """Columns of a tile."""
    return max(16, 1 << (head_size - 1).bit_length())


@cache
def architecture(device: torch.device) -> str:
    """The row of TILES for a device; an unknown device gets the row with the smallest tiles."""
    if device.type == "cpu":
        return "none"
    if torch.version.hip:
        return "sm_80"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"
