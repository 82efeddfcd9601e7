"""The recycled data set as others take it: Parquet, Alpaca and chat records, a data set card, and its lineage.

    <folder>/parquet/*.parquet     everything: texts before and after, critiques, scores, outcome
    <folder>/alpaca/*.jsonl        instruction, input, output: a record a line
    <folder>/messages/*.jsonl      messages: a user's and an assistant's turn
    <folder>/lineage.json          what it was made from: files, prompts, models, configuration, counts
    <folder>/README.md             the card, for people and for `datasets.load_dataset(<folder>)`; written last

Written by Ray Data tasks, one file a block; nothing is collected.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyarrow import fs
from pydantic import Field
from ray.data import Dataset
from ray.data.datasource import FilenameProvider

from operators.columns import RECYCLED, RECYCLED_OUTCOMES
from operators.stage import StageConfig, require_columns
from operators.student.encode import user_text

CARD = "dataset_card.md.j2"
RENAMED = {
    "row_id": "row_id",
    "final_instruction": "instruction",
    "input": "input",
    "final_response": "output",
    "outcome": "outcome",
    "instruction": "original_instruction",
    "response": "original_output",
    "instruction_critique": "instruction_critique",
    "response_critique": "response_critique",
    "ifd_original": "ifd_original",
    "ifd_better_instruction": "ifd_better_instruction",
    "rifd_selected": "rifd_selected",
    "rifd_better_response": "rifd_better_response",
}
ALPACA = ("instruction", "input", "output")


class PublishConfig(StageConfig):
    """Configuration of `publish`, the section `publish`."""

    title: str = Field("Recycled instructions", min_length=1, description="of the card")
    license: str = Field("unknown", pattern=r"^[\w.+-]+$", description="of the source, as an SPDX id or Hugging Face's")
    language: list[str] = Field(["en"], description="ISO 639 codes")


def publish(rows: Dataset, folder: str, lineage: dict[str, Any], config: PublishConfig) -> dict[str, Any]:
    """Write the recycled rows with card and lineage; what lay in `folder` is replaced.

    Args:
        rows: columns.RECYCLED; rows that were quarantined or dropped are left out, and counted in the lineage.
        folder: absolute path or URI.
        lineage: what the data was made from, JSON; of its keys the card shows source, teacher, student and outcomes.
        config: what the card says beside it.

    Returns:
        folder, and rows: how many were written in each format.
    """
    require_columns("publish", RECYCLED.names, rows.columns() or [])
    filesystem, root = fs.FileSystem.from_uri(folder)
    filesystem.create_dir(root)
    filesystem.delete_dir_contents(root)
    published = rows.map_batches(_published, batch_format="pyarrow", num_cpus=0.25)
    published.write_parquet(f"{root}/parquet", filesystem=filesystem)
    records = rows.select_columns(["outcome", "input", "final_instruction", "final_response"])
    for name, take in (("alpaca", _alpaca), ("messages", _messages)):
        taken = records.map_batches(take, batch_format="pyarrow", num_cpus=0.25)
        taken.write_json(f"{root}/{name}", filesystem=filesystem, filename_provider=_Lines(), force_ascii=False)
    num_rows = sum(lineage["outcomes"].get(outcome, 0) for outcome in RECYCLED_OUTCOMES)
    _put(filesystem, f"{root}/lineage.json", json.dumps(lineage, indent=1, ensure_ascii=False))
    _put(filesystem, f"{root}/README.md", dataset_card(lineage, num_rows, config))
    return {"folder": folder, "rows": num_rows}


def dataset_card(lineage: dict[str, Any], num_rows: int, config: PublishConfig) -> str:
    """The card's Markdown, with the header that `datasets` reads; all values are quoted as JSON, which YAML takes."""
    environment = Environment(  # noqa: S701 - Markdown, and every text from outside is quoted
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(CARD).render(config=config, lineage=lineage, num_rows=num_rows)


class _Lines(FilenameProvider):
    """Names that say what is in the files: JSON lines."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{write_uuid}_{task_index:06}.jsonl"

    def get_filename_for_block(self, block: Any, write_uuid: str, task_index: int, block_index: int) -> str:
        return f"{write_uuid}_{task_index:06}_{block_index:06}.jsonl"


def _recycled(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_in(rows["outcome"], pa.array(RECYCLED_OUTCOMES)))


def _published(rows: pa.Table) -> pa.Table:
    return _recycled(rows).select(list(RENAMED)).rename_columns(list(RENAMED.values()))


def _alpaca(rows: pa.Table) -> pa.Table:
    kept = _recycled(rows).select(["final_instruction", "input", "final_response"])
    return kept.rename_columns(list(ALPACA))


def _messages(rows: pa.Table) -> pa.Table:
    kept = _alpaca(rows)
    texts = zip(*(kept[name].to_pylist() for name in ALPACA), strict=True)
    turns = [
        [
            {"role": "user", "content": user_text(instruction, extra)},
            {"role": "assistant", "content": output},
        ]
        for instruction, extra, output in texts
    ]
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.table({"messages": pa.array(turns, pa.list_(turn))})


def _put(filesystem: fs.FileSystem, path: str, text: str) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(text.encode())
