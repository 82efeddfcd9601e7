"""Which pack is trained on when: a plan that every worker computes alike, so that no row is lost or seen twice.

The order is a function of the seed and of the packs' row ids, never of file order or of the number of workers.
Each worker copies the packs once into a memory-mapped Arrow file of its own: random access costs a page fault
and the packs take disk (12 bytes a token), not memory.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators import columns
from operators.student.encode import IGNORED

_INDEX = ["outcome", "row_ids", "document_lengths"]
_TOKENS = [*_INDEX, "input_ids", "labels"]


@dataclass(frozen=True)
class Pack:
    """One pack, or a dummy without documents that keeps a worker in step with the others."""

    input_ids: list[int]
    labels: list[int]
    document_lengths: list[int]
    document_uids: list[int]


@dataclass(frozen=True)
class PackOrder:
    """The order of packs; a step takes `packs_per_step` of them whatever the number of workers.

    Attributes:
        num_packs: packs of one epoch.
        packs_per_step: packs of one optimizer step; the last step of an epoch may have fewer.
        seed: with the epoch's number it determines the order of the epoch.
    """

    num_packs: int
    packs_per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see each pack once."""
        return -(-self.num_packs // self.packs_per_step)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to; both count from 0."""
        return step // self.steps_per_epoch

    def packs_of(self, step: int) -> list[int]:
        """Indices of the packs of one optimizer step."""
        order = np.random.default_rng([self.seed, self.epoch(step)]).permutation(self.num_packs)
        first = step % self.steps_per_epoch * self.packs_per_step
        return [int(index) for index in order[first : first + self.packs_per_step]]

    def micro_steps(self, world_size: int) -> int:
        """Forward passes of each worker in one step: the same number on each, with dummies where packs run out."""
        return -(-self.packs_per_step // world_size)

    def share(self, step: int, rank: int, world_size: int) -> list[int | None]:
        """What one worker trains on in one step: `micro_steps` pack indices; None is a dummy."""
        packs = self.packs_of(step)
        slots = range(rank, self.micro_steps(world_size) * world_size, world_size)
        return [packs[slot] if slot < len(packs) else None for slot in slots]


@dataclass(frozen=True)
class PackIndex:
    """What the driver needs to know of the packs without reading their tokens."""

    num_packs: int
    digest: str


def read_index(files: list[str]) -> PackIndex:
    """Read ids and lengths only.

    Args:
        files: Parquet files of PACKS, in any order.

    Raises:
        ValueError: there is no pack in them.
    """
    keys = [key for table in _read(files, _INDEX) for key in _keys(table)]
    if not keys:
        raise ValueError(
            f"train: no pack in {len(files)} files of packed_sequences; every row was quarantined or none was recycled"
        )
    return PackIndex(len(keys), _digest(keys))


class PackStore:
    """All packs of the files in the order of their first row id, memory-mapped."""

    def __init__(self, files: list[str]) -> None:
        self._table = _map_tokens(files)
        keys = _keys(self._table)
        self.digest = _digest(keys)
        self._order = sorted(range(len(keys)), key=keys.__getitem__)

    def __len__(self) -> int:
        return len(self._order)

    def pack(self, index: int) -> Pack:
        """The tokens of one pack.

        Raises:
            ValueError: its documents do not cover its tokens; the file was not written by `pack`.
        """
        row = {name: self._table[name][self._order[index]].as_py() for name in _TOKENS[1:]}
        if not sum(row["document_lengths"]) == len(row["input_ids"]) == len(row["labels"]):
            raise ValueError(
                f"train: the pack of row {row['row_ids'][0]!r} has {len(row['input_ids'])} tokens and "
                f"{len(row['labels'])} labels against documents of {sum(row['document_lengths'])}; pack again"
            )
        uids = [document_uid(row_id) for row_id in row["row_ids"]]
        return Pack(row["input_ids"], row["labels"], row["document_lengths"], uids)

    def supervised_tokens(self, indices: list[int]) -> int:
        """Tokens with a loss in these packs."""
        return sum(_supervised(self._table["labels"][self._order[index]]) for index in indices)

    def tokens(self, indices: list[int]) -> int:
        """All tokens of these packs."""
        return sum(len(self._table["input_ids"][self._order[index]]) for index in indices)


def dummy_pack(token: int) -> Pack:
    """Two tokens of no document, without loss: the forward and backward passes run, the gradient is zero."""
    return Pack([token, token], [IGNORED, IGNORED], [], [])


def document_uid(row_id: str) -> int:
    """A signed 64-bit hash of a row's id, the same on every machine; NEFTune's noise depends on it."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "big", signed=True)


def _supervised(labels: pa.ListScalar) -> int:
    return int(np.count_nonzero(labels.values.to_numpy() != IGNORED))


def _keys(table: pa.Table) -> list[tuple[list[str], list[int]]]:
    return list(zip(table["row_ids"].to_pylist(), table["document_lengths"].to_pylist(), strict=True))


def _digest(keys: list[tuple[list[str], list[int]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row_ids, lengths in sorted(keys):
        digest.update(f"{row_ids} {lengths}\n".encode())
    return digest.hexdigest()


def _read(files: list[str], wanted: list[str]) -> Iterator[pa.Table]:
    schema = pa.schema([columns.PACKS.field(name) for name in wanted])
    for file in files:
        for batch in pq.ParquetFile(file, memory_map=True).iter_batches(batch_size=256, columns=wanted):
            table = columns.conform(pa.Table.from_batches([batch]), schema)
            yield table.filter(pa.compute.equal(table["outcome"], columns.PACKED))


def _map_tokens(files: list[str]) -> pa.Table:
    """Copy the packs into an uncompressed Arrow file and map it; the file has no name once it is mapped."""
    with tempfile.TemporaryDirectory(prefix="packs-") as folder:
        path = Path(folder) / "packs.arrow"
        schema = pa.schema([columns.PACKS.field(name) for name in _TOKENS])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for table in _read(files, _TOKENS):
                writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
