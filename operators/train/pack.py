"""Packs recycled examples: whole documents, one after the other, up to a fixed number of tokens.

A hash of their ids first groups rows into buckets, so that packs are a function of rows, tokenizer and configuration,
and do not depend on the order in which rows arrive. Best-fit-decreasing packing needs all lengths of a bucket before it
places a document: O(n log n) comparisons, and one bucket of tokens in memory (at most `rows_per_block` x `max_tokens` x
4 bytes x 3). On Alpaca this gives packs that are over 97 % full, without a split document and without padding; packs
may be shorter than `max_tokens`, never longer.
"""

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.data import ActorPoolStrategy, Dataset

from operators import columns
from operators.join import add_up, group_by_key
from operators.progress import report_progress
from operators.stage import Operational, StageConfig, require_columns
from operators.student.encode import (
    IGNORED,
    Encoded,
    EncodingError,
    LossOn,
    encode_example,
    load_tokenizer,
    require_template,
)
from operators.train.mixture import NOT_REPLAYED, MixtureConfig, is_general
from operators.train.overlong import Overlong, fit, is_first_part, part_id

COLUMNS_IN = ("row_id", "input", "outcome", "final_instruction", "final_response")
DIALOGUE = ("turns_before", "turns_after")  # columns of a source with dialogues
_BUCKET = "bucket"
TOO_LONG = "quarantined:too_long"
_COUNTED = ("rows", "general_rows", "tokens", "split_rows", "cut_rows", "lost_tokens")


class PackConfig(StageConfig):
    """Configuration of `pack`, the section `pack`."""

    max_tokens: int = Field(
        default=1024, ge=16, description="Length of a pack, in tokens; `overlong` decides about longer examples."
    )
    overlong: Overlong = Field(
        default="quarantine",
        description="What happens to a longer example: quarantine leaves it out with a reason, truncate keeps its "
        "first tokens and counts the lost ones, split makes documents of its parts and loses no supervised token.",
    )
    packed: bool = Field(
        default=True, description="Several documents share a pack; false trains each document in a pack of its own."
    )
    loss_on: LossOn = Field(
        default="last",
        description="Which of the assistant's turns in a dialogue have a loss: recycled is the answer of the pair that "
        "source.turns picks, last is this answer and the dialogue's last one, all is all of them.",
    )
    rows_per_block: int = Field(
        default=4096, gt=0, description="Approximate number of examples that are packed together, chosen by their ids."
    )
    mixture: MixtureConfig = MixtureConfig()
    tokenizers: Operational[int] = Field(default=1, gt=0, description="Number of actors that encode and pack.")
    cpus_per_tokenizer: Operational[float] = Field(
        default=0.5, gt=0, description="Logical CPUs that such an actor reserves."
    )

    def identity(self) -> dict[str, Any]:
        """Leave out `mixture`, which is a newer key, unless it is set, so that older work stays valid."""
        chosen = super().identity()
        if self.mixture == MixtureConfig():
            del chosen["mixture"]
        return chosen


@dataclass(frozen=True)
class Document:
    """One encoded example with the id of its row, or one part of it.

    If the row was cut, the first part has `cut`, and in `lost` the number of supervised tokens that were cut off.
    """

    row_id: str
    encoded: Encoded
    lost: int = 0
    cut: bool = False

    def __len__(self) -> int:
        return len(self.encoded.input_ids)


def pack(rows: Dataset, config: PackConfig, student: str, chat_template: str = "") -> Dataset:
    """Encode the recycled rows with the student's template and pack them.

    Columns in: RECYCLED; rows with other outcomes than RECYCLED_OUTCOMES are skipped; an earlier stage counted them.
    Columns out: PACKS; every recycled row's id is in exactly one `row_ids`, of a pack or of a quarantined row
        (`quarantined:too_long`, `:special_tokens`, `:chat_template`, `:no_loss`, `:no_end_of_turn`), or of a row that
        came with the outcome `dropped:not_replayed`. Further parts of a split row have ids of their own, see
        `part_id`. `cut_rows` and `lost_tokens` count rows and supervised tokens that were cut off.

    Packs are a function of the rows, the tokenizer and the configuration; neither the order of the rows nor the number
    of tokenizers changes them.

    Args:
        rows: recycled instructions; read twice, because they are counted first.
        config: sizes.
        student: folder or hub id whose tokenizer and chat template are used.
        chat_template: text that replaces the student's own template; "" keeps it.

    Raises:
        ValueError: a column is missing, or (from the actor) the student's chat template fails on every example.
    """
    found = rows.columns() or []
    require_columns("pack", COLUMNS_IN, found)
    wanted = [*COLUMNS_IN, *(name for name in DIALOGUE if name in found)]
    buckets = 1 + rows.count() // config.rows_per_block
    placed = rows.map_batches(
        partial(_place, wanted=wanted, buckets=buckets), batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )
    return group_by_key(placed, _BUCKET, buckets).map_batches(
        Packer,
        fn_constructor_kwargs={"config": config, "student": student, "chat_template": chat_template},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=config.cpus_per_tokenizer,
        compute=ActorPoolStrategy(size=config.tokenizers),
    )


def _place(rows: pa.Table, wanted: list[str], buckets: int) -> pa.Table:
    """Give each row its bucket, by its id alone."""
    ids = rows["row_id"].to_pylist()
    hashes = (hashlib.blake2b(str(row_id).encode(), digest_size=8).digest() for row_id in ids)
    places = pa.array([int.from_bytes(digest, "big") % buckets for digest in hashes], pa.int32())
    return rows.select(wanted).append_column(_BUCKET, places)


class Packer:
    """The actor's body: holds the tokenizer; each call packs the buckets of one block."""

    def __init__(self, config: PackConfig, student: str, chat_template: str = "") -> None:
        self._config = config
        self._tokenizer = load_tokenizer(student, chat_template)
        require_template(self._tokenizer)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Pack rows of whole buckets; returns columns PACKS."""
        if not rows.num_rows:  # the shuffle may give a block no columns at all
            return columns.PACKS.empty_table()
        buckets: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in rows.to_pylist():
            if row["outcome"] in (*columns.RECYCLED_OUTCOMES, NOT_REPLAYED):
                buckets[row.get(_BUCKET, 0)].append(row)
        tables = [self._pack(buckets[bucket]) for bucket in sorted(buckets)]
        return pa.concat_tables(tables) if tables else columns.PACKS.empty_table()

    def _pack(self, rows: list[dict[str, Any]]) -> pa.Table:
        documents, quarantined = [], []
        for row in sorted(rows, key=lambda row: str(row["row_id"])):
            if row["outcome"] == NOT_REPLAYED:
                quarantined.append((row["row_id"], NOT_REPLAYED))
                continue
            try:
                encoded = self._encode(row)
            except EncodingError as error:
                quarantined.append((row["row_id"], f"quarantined:{error.reason}"))
                continue
            fitted = fit(encoded, self._config.max_tokens, self._config.overlong)
            if not fitted.parts:
                quarantined.append((row["row_id"], TOO_LONG))
            for number, part in enumerate(fitted.parts):
                documents.append(Document(part_id(row["row_id"], number), part, fitted.lost, fitted.cut and not number))
        if self._config.packed:
            packs = best_fit_decreasing(documents, self._config.max_tokens)
        else:
            packs = [[document] for document in documents]
        report_progress("pack", rows=len(rows), tokens=sum(map(len, documents)))
        return _to_table(packs, quarantined)

    def _encode(self, row: dict[str, Any]) -> Encoded:
        return encode_example(
            self._tokenizer,
            row["final_instruction"],
            row["input"],
            row["final_response"],
            *(row.get(name) for name in DIALOGUE),
            loss_on=self._config.loss_on,
        )


def count_packed(packs: Dataset) -> dict[str, int]:
    """Counts for the manifest and the check that no row is lost.

    They are rows in packs and in quarantine, those of general data among them, tokens, rows that were split or cut, and
    lost supervised tokens.
    """
    return add_up(packs.map_batches(_count_pack_rows, batch_format="pyarrow", num_cpus=0.25), list(_COUNTED))


def _count_pack_rows(packs: pa.Table) -> pa.Table:
    ids = [row_id for row_ids in packs["row_ids"].to_pylist() for row_id in row_ids]
    sums = {
        "rows": sum(map(is_first_part, ids)),
        "general_rows": sum(is_first_part(row_id) and is_general(row_id) for row_id in ids),
        "tokens": pc.sum(pc.list_value_length(packs["input_ids"])).as_py() or 0,
        "split_rows": sum(row_id.endswith("#2") and not is_first_part(row_id) for row_id in ids),
        **{name: pc.sum(packs[name]).as_py() or 0 for name in _COUNTED[4:]},
    }
    return pa.table({name: [value] for name, value in sums.items()})


def best_fit_decreasing(documents: list[Document], max_tokens: int) -> list[list[Document]]:
    """Put each document, longest first, into the fullest pack that still has room for it.

    This gives at most 11/9 of the smallest possible number of packs, plus one (Johnson 1973). The row id decides ties,
    so the result is a function of the set of documents.

    Args:
        documents: each at most `max_tokens` long.
        max_tokens: capacity of a pack.
    """
    packs: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # (free tokens, index of the pack), sorted
    for document in sorted(documents, key=lambda document: (-len(document), document.row_id)):
        place = bisect_left(room, (len(document), -1))
        if place == len(room):
            packs.append([document])
            insort(room, (max_tokens - len(document), len(packs) - 1))
        else:
            free, index = room.pop(place)
            packs[index].append(document)
            insort(room, (free - len(document), index))
    return packs


def _to_table(packs: list[list[Document]], quarantined: list[tuple[str, str]]) -> pa.Table:
    rows = [_pack_row(documents) for documents in packs]
    lists = ("input_ids", "labels", "position_ids", "document_lengths")
    empty: dict[str, object] = {**{name: [] for name in lists}, "cut_rows": 0, "lost_tokens": 0}
    rows += [{**empty, "row_ids": [row_id], "outcome": outcome} for row_id, outcome in quarantined]
    return pa.Table.from_pylist(rows, schema=columns.PACKS)


def _pack_row(documents: list[Document]) -> dict[str, object]:
    return {
        "input_ids": [token for document in documents for token in document.encoded.input_ids],
        # The first token of a document follows another document, so it must have no loss.
        "labels": [label for document in documents for label in [IGNORED, *document.encoded.labels[1:]]],
        "position_ids": [position for document in documents for position in range(len(document))],
        "document_lengths": [len(document) for document in documents],
        "row_ids": [document.row_id for document in documents],
        "outcome": columns.PACKED,
        "cut_rows": sum(document.cut for document in documents),
        "lost_tokens": sum(document.lost for document in documents),
    }
