"""Sizes of the kernels' tiles: a committed default for each architecture, or Triton's autotuning.

For bf16 at d = 64 and up to sixteen chosen segments the defaults compile without spills to memory, within shared memory
and to tensor-core code on all four architectures (docs/aot.md has the figures). Others have smaller tiles or more
warps, by analogy, and were not compiled. None was timed. HYPER_ATTENTION_AUTOTUNE=1 times a few at the first call of
each kernel instead: tuned tiles may differ between runs, and with them the last bits of a result.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.hyper_attention.gpu.backward import key_gradient_kernel, query_gradient_kernel
from kernels.hyper_attention.gpu.forward import forward_kernel
from kernels.hyper_attention.gpu.tiles import Rows


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its loops."""

    BM: int
    BN: int
    warps: int
    stages: int


# By kernel; then for rows of at most 128, 256, 512 and 1024 bytes: d = 64, 128, 256 in bf16; 32, 64, 128, 256 in fp32.
DEFAULTS: dict[str, dict[str, tuple[Tile, Tile, Tile, Tile]]] = {
    "sm_80": {
        "forward": (Tile(64, 32, 4, 3), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 2)),
        "query_gradient": (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
        "key_gradient": (Tile(16, 64, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    },
    "sm_90": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        "query_gradient": (Tile(64, 64, 8, 3), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        "key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
    },
    "sm_100": {
        "forward": (Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        "query_gradient": (Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        "key_gradient": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
    },
    "gfx942": {
        "forward": (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1)),
        "query_gradient": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(32, 16, 4, 1)),
        "key_gradient": (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
    },
    # Triton's interpreter on a CPU.
    "none": dict.fromkeys(("forward", "query_gradient", "key_gradient"), (Tile(32, 32, 4, 1),) * 4),
}
# The numbers of a query's chosen segments stay in registers: a launch that reads more than _FEW takes a smaller tile,
# that of rows so many times twice as wide.
_FEW = 8
_SMALLER = {"forward": 1, "query_gradient": 1, "key_gradient": 3}
_KERNELS = {"forward": forward_kernel, "query_gradient": query_gradient_kernel, "key_gradient": key_gradient_kernel}


def launch(
    name: str,
    part: str,
    rows: int,
    heads: int,
    x: Tensor,
    *arguments: Any,
    pieces: int = 1,
    chosen: int = 0,
    everything: bool,
) -> None:
    """Run a kernel over all tiles of `rows` rows.

    Args:
        name: of the kernel.
        part: of the plan; parts are tuned apart.
        rows: queries, or keys for the kernel that owns keys.
        heads: of these rows.
        x: a tensor [B, H, N, D] of the inputs' batch, head size, dtype and device.
        arguments: of the kernel up to its sizes.
        pieces: programs that share the work of a tile, each with an output of its own.
        chosen: segments of which it reads for each query that their means are hidden.
        everything: its ALL.
    """
    D, tiled = x.shape[3], "BN" if name == "key_gradient" else "BM"
    precision = ("ieee" if torch.version.hip else "tf32x3") if x.dtype == torch.float32 else None
    constants = {"D": D, "BD": padded(D), "ALL": everything, "PRECISION": precision}

    def grid(sizes: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(rows, sizes[tiled]) * heads, x.shape[0], pieces

    if os.environ.get("HYPER_ATTENTION_AUTOTUNE") == "1" and x.device.type != "cpu":
        _tuned(name, part, x.dtype)[grid](*arguments, **constants)
    else:
        tile = default_tile(architecture(x.device), name, D, x.element_size(), chosen)
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        _KERNELS[name][grid](*arguments, BM=tile.BM, BN=tile.BN, **constants, **options)


def padded(head_size: int) -> int:
    """Columns of a tile."""
    return max(16, 1 << (head_size - 1).bit_length())


def default_tile(architecture: str, name: str, head_size: int, item_bytes: int, chosen: int = 0) -> Tile:
    """The committed tile for a kernel."""
    width = max(0, (padded(head_size) * item_bytes - 1).bit_length() - 7)
    tiles = DEFAULTS[architecture][name]
    return tiles[min(width + (_SMALLER[name] if chosen > _FEW else 0), len(tiles) - 1)]


@cache
def architecture(device: torch.device) -> str:
    """The row of DEFAULTS for a device; those unknown get the one with the smallest tiles."""
    if device.type == "cpu":
        return "none"
    if torch.version.hip:
        return "gfx942"
    major: int = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@cache
def _tuned(name: str, part: str, dtype: torch.dtype) -> Any:
    """The kernel with autotuning; parts and dtypes are tuned apart, which Triton cannot see in the kernel's tuples."""
    tiles = dict.fromkeys(tile for sizes in DEFAULTS.values() for tile in sizes[name])
    tiles |= dict.fromkeys(Tile(128, 64, 8, stages) for stages in (2, 3))
    configs = [
        triton.Config({"BM": tile.BM, "BN": tile.BN}, num_warps=tile.warps, num_stages=tile.stages) for tile in tiles
    ]
    save, restore = _keeper()
    return triton.autotune(configs, key=["D", "ALL"], pre_hook=save, post_hook=restore)(_KERNELS[name])


def _keeper() -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that undo what a timed run writes: a launch adds to what earlier ones left."""
    kept: list[tuple[Tensor, Tensor]] = []

    def save(arguments: dict[str, Any], reset_only: bool = False) -> None:
        target = arguments["target"]
        written = [x.pointer for x in ((target,) if isinstance(target, Rows) else target)]
        if "lse" in arguments:
            written.append(arguments["lse"].pointer)
        kept[:] = [] if reset_only else [(x, x.clone()) for x in written]

    def restore(arguments: dict[str, Any], exception: Exception | None) -> None:
        for x, copy in kept:
            x.copy_(copy)

    return save, restore
