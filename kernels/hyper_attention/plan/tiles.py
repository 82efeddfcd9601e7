"""Tiles of queries that share one list of older segments, in each document longer than `exact_below`.

A document is cut into tiles of TILE tokens from its first token on, so that a packed document has the same tiles as
alone. A slot of the table belongs to a block of TILE positions of the row. With documents a block has two slots: one
for the tile of the document of its first position, one for a document that begins inside the block. No more tiles can
begin there, because a document with tiles is longer than TILE. All of this is arithmetic on where the document of a
position begins and ends; the GPU's kernels compute the same without a table.

Shape letters: B batch, T queries, S keys, N slots of tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents

TILE = 128


@dataclass(frozen=True)
class Tiles:
    """Where each tile lies, in key positions; int64.

    Attributes:
        row: [B, N], first position of the tile; S if the slot is empty.
        stop: [B, N], one past its last position; `row` if the slot is empty.
        start: [B, N], first position of its document.
        older: [B, N], tokens of its document before its window; a multiple of the segment.
        before: [B, N], slot of the document's tile before it, -1: none.
        slot: [B, T], slot of each query, -1: its document is exact.
        size: rows of a full tile.
    """

    row: Tensor
    stop: Tensor
    start: Tensor
    older: Tensor
    before: Tensor
    slot: Tensor
    size: int


@dataclass(frozen=True)
class TileLists:
    """Older segments that the rows of a tile read exactly; each is read from a certain row of the tile on.

    Attributes:
        tiles: where the tiles lie.
        segment: int32 [B, Hq, N, C], number of the segment, P: no entry; entries are in the order of `first`.
        first: int32 [B, Hq, N, C], the first row of the tile that reads it; TILE: no entry.
    """

    tiles: Tiles
    segment: Tensor
    first: Tensor

    def read(self, segments: int, offset: int) -> Tensor:
        """Segments that each query reads exactly, int32 [B, Hq, T, C], `segments` is none.

        Args:
            segments: P.
            offset: key position of query 0.
        """
        B, Hq, _, C = self.segment.shape
        slot = self.tiles.slot.clamp(min=0)
        position = torch.arange(slot.shape[1], device=slot.device) + offset
        row = torch.where(self.tiles.slot < 0, -1, position - self.tiles.row.gather(1, slot))
        index = slot[:, None, :, None].expand(B, Hq, -1, C)
        seen = self.first.gather(2, index) <= row[:, None, :, None]
        return torch.where(seen, self.segment.gather(2, index), segments)


def cut_tiles(documents: Documents, queries: int, config: HyperAttentionConfig) -> Tiles:
    """The tiles of all documents longer than `exact_below`; the queries stand at the last `queries` key positions."""
    size, S = TILE, documents.start.shape[1]
    exact_below = max(config.exact_limit, size)
    first_block = (S - queries) // size
    block = torch.arange(first_block, -(-S // size), device=documents.start.device)
    long = documents.lengths() > exact_below
    # The document of the block's first position, and the one that begins inside it and holds its last position.
    heads = [block * size] if documents.single else [block * size, (block * size + size - 1).clamp(max=S - 1)]
    rows, stops, starts, befores = [], [], [], []
    for kind, position in enumerate(heads):
        start, stop = documents.start[:, position], documents.stop[:, position]
        row = start + -(-(block * size - start).clamp(min=0) // size) * size
        valid = long[:, position] & (row < stop)
        if kind:
            valid = valid & (start > block * size)
        before_block = torch.div(row - size, size, rounding_mode="floor")
        inside = (start > before_block * size).long()  # the tile before is the one that begins inside its block
        before = (before_block - first_block) * len(heads) + inside
        rows.append(torch.where(valid, row, S))
        stops.append(torch.where(valid, torch.minimum(stop, row + size), S))
        starts.append(torch.where(valid, start, 0))
        befores.append(torch.where(valid & (row > start) & (before_block >= first_block), before, -1))
    row, stop, start, before = (torch.stack(x, 2).flatten(1) for x in (rows, stops, starts, befores))
    local = (row - start).clamp(min=0)
    older = torch.where(row < S, (local - config.window).clamp(min=0) // config.segment * config.segment, 0)
    position = torch.arange(S - queries, S, device=row.device)
    begin = documents.start[:, S - queries :]
    own_row = begin + (position - begin) // size * size
    own_block = own_row // size
    inside = (begin > own_block * size).long() * (len(heads) > 1)
    slot = torch.where(long[:, S - queries :], (own_block - first_block) * len(heads) + inside, -1)
    return Tiles(row, stop, start, older, before, slot, size)
