"""The order of packs in training; every worker computes the same order, so that no row is lost or seen twice.

The order is a function of the seed and of the packs' row ids, never of file order or of the number of workers.
Each worker copies the packs once into its own memory-mapped Arrow file: random access costs a page fault, and the packs
take disk (12 bytes per token), not memory.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from operators import columns
from operators.student.encode import IGNORED
from operators.student.packed_documents import Pack
from operators.train.config import TrainConfig
from operators.train.validation import validation_packs

if TYPE_CHECKING:  # a worker's process may not have Ray, for example in a benchmark
    from ray.data import Dataset

_INDEX = ["outcome", "row_ids", "document_lengths"]
Key = tuple[list[str], list[int]]  # ids of a pack's rows, and their lengths in tokens
_TOKENS = [*_INDEX, "input_ids", "labels"]


class PackOrder:
    """The packs of each optimizer step, for any number of workers; epochs and steps count from 0.

    Each epoch has the same number of steps and sees each pack once, in its own order. A step takes a fixed number of
    packs (the last step of an epoch may have fewer), or as many as come closest to a number of examples or tokens.
    """

    def __init__(
        self, sizes: Sequence[int] | np.ndarray, per_step: int, seed: int, indices: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            sizes: of each pack that is trained on: 1 to count packs, else its number of examples or tokens.
            per_step: the sum of sizes for one optimizer step.
            seed: it determines, with the epoch's number, the order of the epoch.
            indices: of these packs in the store; None if they are all of its packs.
        """
        self._indices = np.arange(len(sizes)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._sizes, self._seed = np.asarray(sizes, dtype=np.int64), seed
        self.num_packs, total = len(self._sizes), int(self._sizes.sum())
        self._counts_packs = bool((self._sizes == 1).all())
        self._per_step = per_step
        steps = -(-self.num_packs // per_step) if self._counts_packs else round(total / per_step)
        self.steps_per_epoch = min(self.num_packs, max(1, steps))
        self._begins_of = lru_cache(maxsize=2)(self._epoch)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to."""
        return step // self.steps_per_epoch

    def packs_of(self, step: int) -> list[int]:
        """Indices of the packs of one optimizer step; at least one."""
        order, begins = self._begins_of(self.epoch(step))
        place = step % self.steps_per_epoch
        return [int(self._indices[index]) for index in order[begins[place] : begins[place + 1]]]

    def share(self, step: int, rank: int, world_size: int) -> list[int | None]:
        """Packs of one worker in one step: equally many for each worker; None is a dummy."""
        packs = self.packs_of(step)
        slots = range(rank, -(-len(packs) // world_size) * world_size, world_size)
        return [packs[slot] if slot < len(packs) else None for slot in slots]

    def passes(self, step: int, rank: int, world_size: int, packs_per_pass: int) -> list[list[int]]:
        """The same, grouped by forward passes, equally many on each worker; an empty group reads only a dummy."""
        share = self.share(step, rank, world_size)
        parts = [share[begin : begin + packs_per_pass] for begin in range(0, len(share), packs_per_pass)]
        return [[index for index in part if index is not None] for part in parts]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the packs, and the places in it where each step begins, plus the end of the last one."""
        order = np.random.default_rng([self._seed, epoch]).permutation(self.num_packs)
        steps = self.steps_per_epoch
        if self._counts_packs:
            return order, np.minimum(np.arange(steps + 1) * self._per_step, self.num_packs)
        ends = np.cumsum(self._sizes[order])
        shares = np.searchsorted(ends, np.arange(1, steps) * ends[-1] / steps, side="left") + 1
        begins = np.concatenate([[0], shares, [self.num_packs]])
        for place in range(1, steps):  # no step may be empty, even if packs are large
            begins[place] = min(max(begins[place], begins[place - 1] + 1), self.num_packs - (steps - place))
        return order, begins


@dataclass(frozen=True)
class PackIndex:
    """Ids and lengths of the packs, for the driver, without their tokens; in the order of the store."""

    row_ids: list[list[str]]
    document_lengths: list[list[int]]

    @property
    def num_packs(self) -> int:
        """Packs of one epoch."""
        return len(self.row_ids)

    def num_trained(self, config: TrainConfig) -> int:
        """Number of rows, or parts of split rows, in the packs that are trained on; an epoch sees each once."""
        kept_out = set(validation_packs(self.num_packs, config))
        return sum(len(row_ids) for index, row_ids in enumerate(self.row_ids) if index not in kept_out)

    @property
    def digest(self) -> str:
        """Hash of the rows of each pack and their lengths."""
        return _digest(list(zip(self.row_ids, self.document_lengths, strict=True)))

    def order(self, config: TrainConfig) -> PackOrder:
        """The order in which a run of this configuration takes the packs."""
        return pack_order(self.document_lengths, config)

    def rows_of_step(self, config: TrainConfig, step: int) -> list[str]:
        """Ids of the rows that optimizer step `step` (from 0) learns from.

        Raises:
            ValueError: the run has no such step.
        """
        order = self.order(config)
        total = config.total_steps(order.steps_per_epoch)
        if not 0 <= step < total:
            raise ValueError(f"train: step {step} of {total}; steps count from 0")
        return [row_id for index in order.packs_of(step) for row_id in self.row_ids[index]]


def pack_order(document_lengths: list[list[int]], config: TrainConfig) -> PackOrder:
    """The order of packs with these documents under this configuration, without those that are kept for validation.

    Raises:
        ValueError: validation would take all packs.
    """
    kept_out = set(validation_packs(len(document_lengths), config))
    indices = [index for index in range(len(document_lengths)) if index not in kept_out]
    trained = [document_lengths[index] for index in indices]
    if config.examples_per_step:
        return PackOrder([len(lengths) for lengths in trained], config.examples_per_step, config.seed, indices)
    if config.tokens_per_step:
        return PackOrder([sum(lengths) for lengths in trained], config.tokens_per_step, config.seed, indices)
    return PackOrder([1] * len(trained), config.packs_per_step, config.seed, indices)


def read_index(files: list[str]) -> PackIndex:
    """Read ids and lengths only.

    Args:
        files: Parquet files of PACKS, in any order.

    Raises:
        ValueError: there is no pack in them, or a row is in two packs.
    """
    return _index(key for table in _read(files, _INDEX) for key in _keys(table))


def index_of(packs: "Dataset") -> PackIndex:
    """The same for a data set of PACKS."""
    tables: Iterable[Any] = packs.select_columns(_INDEX).iter_batches(batch_size=None, batch_format="pyarrow")
    return _index(key for table in tables for key in _keys(table.filter(_is_packed(table))))


def _index(found: Iterable[Key]) -> PackIndex:
    keys = sorted(found)
    if not keys:
        raise ValueError("train: no pack in packed_sequences; every row was quarantined or none was recycled")
    ids = Counter(row_id for row_ids, _ in keys for row_id in row_ids)
    twice = [row_id for row_id, count in ids.most_common(1) if count > 1]
    if twice:
        raise ValueError(f"train: row {twice[0]!r} is {ids[twice[0]]} times in the packs; an epoch sees a row once")
    return PackIndex([row_ids for row_ids, _ in keys], [lengths for _, lengths in keys])


class PackStore:
    """All packs of the files in the order of their first row id, memory-mapped."""

    def __init__(self, files: list[str]) -> None:
        self._table = _map_tokens(files)
        keys = _keys(self._table)
        self.digest = _digest(keys)
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        self.row_ids = [keys[index][0] for index in self._order]
        self.document_lengths = [keys[index][1] for index in self._order]

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
        """Number of tokens with a loss in these packs."""
        return sum(_supervised(self._table["labels"][self._order[index]]) for index in indices)

    def examples(self, indices: list[int]) -> int:
        """Number of documents in these packs."""
        return sum(len(self.document_lengths[index]) for index in indices)

    def tokens(self, indices: list[int]) -> int:
        """Number of tokens in these packs."""
        return sum(len(self._table["input_ids"][self._order[index]]) for index in indices)


def dummy_pack(token: int) -> Pack:
    """Two tokens without a document and without loss: forward and backward pass run, and the gradient is zero."""
    return Pack([token, token], [IGNORED, IGNORED], [], [])


def document_uid(row_id: str) -> int:
    """A signed 64-bit hash of a row's id, the same on every machine; NEFTune's noise depends on it."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "big", signed=True)


def _supervised(labels: pa.ListScalar) -> int:
    return int(np.count_nonzero(labels.values.to_numpy() != IGNORED))


def _is_packed(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table["outcome"], columns.PACKED)


def _keys(table: pa.Table) -> list[Key]:
    return list(zip(table["row_ids"].to_pylist(), table["document_lengths"].to_pylist(), strict=True))


def _digest(keys: list[Key]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row_ids, lengths in sorted(keys):
        digest.update(f"{row_ids} {lengths}\n".encode())
    return digest.hexdigest()


def _read(files: list[str], wanted: list[str]) -> Iterator[pa.Table]:
    schema = pa.schema([columns.PACKS.field(name) for name in wanted])
    for file in files:
        for batch in pq.ParquetFile(file, memory_map=True).iter_batches(batch_size=256, columns=wanted):
            table = columns.conform(pa.Table.from_batches([batch]), schema)
            yield table.filter(_is_packed(table))


def _map_tokens(files: list[str]) -> pa.Table:
    """Copy the packs into an uncompressed Arrow file and map it; the file is unlinked as soon as it is mapped."""
    with tempfile.TemporaryDirectory(prefix="packs-") as folder:
        path = Path(folder) / "packs.arrow"
        schema = pa.schema([columns.PACKS.field(name) for name in _TOKENS])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for table in _read(files, _TOKENS):
                writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
