"""Recycled examples into packs: whole documents, one after the other, that fit a fixed number of tokens.

Best-fit-decreasing packing needs every length of a block before it places one: O(n log n) comparisons and one
block of tokens in memory (`rows_per_block` x `max_tokens` x 4 bytes x 3 at most). What it buys on Alpaca is packs
that are over 97 % full, at no split of a document and no padding; a pack is only ever shorter than `max_tokens`.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.data import ActorPoolStrategy, Dataset

from operators import columns
from operators.join import add_up
from operators.progress import report_progress
from operators.stage import Operational, StageConfig, require_columns
from operators.student.encode import IGNORED, Encoded, EncodingError, encode_example, load_tokenizer, require_template

COLUMNS_IN = ("row_id", "input", "outcome", "final_instruction", "final_response")
TOO_LONG = "quarantined:too_long"
_COUNTED = {"rows": "row_ids", "tokens": "input_ids"}


class PackConfig(StageConfig):
    """How examples are laid out for training."""

    max_tokens: int = Field(default=1024, ge=16, description="tokens of a pack; a longer example is quarantined")
    rows_per_block: int = Field(default=4096, gt=0, description="examples that are packed together")
    tokenizers: Operational[int] = Field(default=1, gt=0, description="actors that encode and pack")
    cpus_per_tokenizer: Operational[float] = Field(default=0.5, gt=0, description="logical CPUs of one such actor")


@dataclass(frozen=True)
class Document:
    """One encoded example with the id of its row."""

    row_id: str
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded.input_ids)


def pack(rows: Dataset, config: PackConfig, student: str) -> Dataset:
    """Encode the recycled rows with the student's template and pack them.

    Columns in: RECYCLED; rows whose outcome is none of RECYCLED_OUTCOMES are skipped, their stage has counted them.
    Columns out: PACKS; every recycled row's id is in exactly one `row_ids`, of a pack or of a quarantined row
        (`quarantined:too_long`, `:special_tokens`, `:chat_template`, `:no_loss`).

    Packs depend only on which rows share a block of `rows_per_block`, not on their order in it.

    Args:
        rows: recycled instructions.
        config: sizes.
        student: folder or hub id whose tokenizer and chat template are used.

    Raises:
        ValueError: a column is missing, or (from the actor) the student's chat template fits no example.
    """
    require_columns("pack", COLUMNS_IN, rows.columns())
    return rows.map_batches(
        Packer,
        fn_constructor_kwargs={"config": config, "student": student},
        batch_format="pyarrow",
        batch_size=config.rows_per_block,
        num_cpus=config.cpus_per_tokenizer,
        compute=ActorPoolStrategy(size=config.tokenizers),
    )


class Packer:
    """The actor's body: holds the tokenizer, packs one block of rows a call."""

    def __init__(self, config: PackConfig, student: str) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(student)
        require_template(self._tokenizer)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block of RECYCLED rows into its PACKS."""
        recycled = [row for row in rows.select(COLUMNS_IN).to_pylist() if row["outcome"] in columns.RECYCLED_OUTCOMES]
        documents, quarantined = [], []
        for row in sorted(recycled, key=lambda row: str(row["row_id"])):
            try:
                encoded = encode_example(self._tokenizer, row["final_instruction"], row["input"], row["final_response"])
            except EncodingError as error:
                quarantined.append((row["row_id"], f"quarantined:{error.reason}"))
                continue
            if len(encoded.input_ids) > self._config.max_tokens:
                quarantined.append((row["row_id"], TOO_LONG))
            else:
                documents.append(Document(row["row_id"], encoded))
        packs = best_fit_decreasing(documents, self._config.max_tokens)
        report_progress("pack", rows=len(recycled), tokens=sum(map(len, documents)))
        return _to_table(packs, quarantined)


def count_packed(packs: Dataset) -> dict[str, int]:
    """Rows in packs and quarantine, and tokens: {"rows", "tokens"}; for the manifest and the check of conservation."""
    return add_up(packs.map_batches(_count_pack_rows, batch_format="pyarrow", num_cpus=0.25), list(_COUNTED))


def _count_pack_rows(packs: pa.Table) -> pa.Table:
    sums = {name: pc.sum(pc.list_value_length(packs[column])).as_py() or 0 for name, column in _COUNTED.items()}
    return pa.table({name: [value] for name, value in sums.items()})


def best_fit_decreasing(documents: list[Document], max_tokens: int) -> list[list[Document]]:
    """Place each document, longest first, into the fullest pack that still has room for it.

    At most 11/9 of the least possible number of packs, plus one (Johnson 1973). Ties go by row id, so the result is
    a function of the set of documents.

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
    empty: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "document_lengths": []}
    rows += [{**empty, "row_ids": [row_id], "outcome": outcome} for row_id, outcome in quarantined]
    return pa.Table.from_pylist(rows, schema=columns.PACKS)


def _pack_row(documents: list[Document]) -> dict[str, object]:
    return {
        "input_ids": [token for document in documents for token in document.encoded.input_ids],
        # A document's first token follows the last of another document: nothing may be learnt from that.
        "labels": [label for document in documents for label in [IGNORED, *document.encoded.labels[1:]]],
        "position_ids": [position for document in documents for position in range(len(document))],
        "document_lengths": [len(document) for document in documents],
        "row_ids": [document.row_id for document in documents],
        "outcome": columns.PACKED,
    }
