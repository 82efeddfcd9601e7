"""The recycled rows as JSON lines, in the two forms that trainers read: Alpaca records and chat messages.

Ray's own `write_json` goes through pandas, which rounds floats to ten digits and makes floats of integers beside nulls;
columns of the source that are passed through must not change.
"""

import json
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from ray.data import Dataset
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from operators.columns import RECYCLED_OUTCOMES
from operators.publish.pass_through import Kinds, with_pass_through
from operators.student.encode import dialogue

ALPACA = ("instruction", "input", "output")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_records(rows: Dataset, filesystem: fs.FileSystem, folder: str, kinds: Kinds, taken: frozenset[str]) -> int:
    """Write `alpaca/*.jsonl` and `messages/*.jsonl`; returns the number of rows that have an Alpaca record.

    Args:
        rows: columns.RECYCLED.
        filesystem: of the folder.
        folder: path of the publication on `filesystem`.
        kinds: of the columns that were passed through.
        taken: the published columns, whose names a passed-through column cannot have.
    """
    names = ["outcome", "input", "final_instruction", "final_response", "turns_before", "turns_after", "extra"]
    records = rows.select_columns(names)
    for name, take in (("alpaca", alpaca_table), ("messages", messages_table)):
        taken_rows = records.map_batches(partial(take, kinds=kinds, taken=taken), batch_format="pyarrow", num_cpus=0.25)
        taken_rows.write_datasink(_JsonLines(f"{folder}/{name}", filesystem=filesystem, file_format="jsonl"))
    found = filesystem.get_file_info(fs.FileSelector(f"{folder}/alpaca", allow_not_found=True))
    return sum(_count_lines(filesystem, info.path) for info in found)


def alpaca_table(rows: pa.Table, kinds: Kinds, taken: frozenset[str]) -> pa.Table:
    """instruction, input, output of the recycled rows without other turns: the format has no place for more turns."""
    kept = recycled(rows)
    alone = pc.and_(*(pc.equal(pc.fill_null(kept[name], ""), "") for name in ("turns_before", "turns_after")))
    kept = kept.filter(alone)
    table = kept.select(["final_instruction", "input", "final_response"]).rename_columns(list(ALPACA))
    return with_pass_through(table, kept["extra"], kinds, taken)


def messages_table(rows: pa.Table, kinds: Kinds, taken: frozenset[str]) -> pa.Table:
    """`messages`: all turns of each recycled row."""
    kept = recycled(rows)
    return with_pass_through(pa.table({"messages": dialogues(kept)}), kept["extra"], kinds, taken)


def recycled(rows: pa.Table) -> pa.Table:
    """The rows that are in the recycled data set: neither quarantined nor dropped."""
    return rows.filter(pc.is_in(rows["outcome"], pa.array(RECYCLED_OUTCOMES)))


def dialogues(rows: pa.Table) -> pa.Array:
    """All turns of each row, as `MESSAGES`."""
    names = ("final_instruction", "input", "final_response", "turns_before", "turns_after")
    columns = (rows[name].to_pylist() for name in names)
    return pa.array([dialogue(*texts) for texts in zip(*columns, strict=True)], MESSAGES)


class _JsonLines(BlockBasedFileDatasink):
    """Writes each row of a block as a JSON object on a line of its own."""

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        for row in block.to_arrow().to_pylist():
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _count_lines(filesystem: fs.FileSystem, path: str) -> int:
    with filesystem.open_input_stream(path) as stream:
        lines = 0
        while chunk := stream.read(1 << 20):
            lines += chunk.count(b"\n")
    return lines
