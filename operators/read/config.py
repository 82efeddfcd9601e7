"""How the source is read: the section `source` of the configuration."""

from typing import Literal

from pydantic import Field

from operators.read.dialogues import Policy
from operators.read.record_fields import Field as SourceField
from operators.stage import Operational, StageConfig


class ReadConfig(StageConfig):
    """Configuration of `read_instructions`, the section `source`."""

    path: Operational[str] = Field(
        min_length=1,
        description="The file, folder, glob or URI (such as s3://bucket/folder or hf://datasets/owner/name) of the "
        "source's files: .json, .jsonl, .ndjson, .csv, .tsv, also with .gz, .zst or .bz2, .parquet or .arrow.",
    )
    split: Literal["train", "validation", "test", "all"] = Field(
        "train",
        description="The split to read if the source's file or folder names contain a split (train, validation, "
        "test); all reads every file.",
    )
    columns: dict[SourceField, str] = Field(
        {},
        description="The source's column for instruction, input, response, system, history or messages, if it does "
        "not have one of the usual names; `answers.text` is a part of a column.",
    )
    pass_through: list[str] = Field(
        [], description="The source's columns that are kept as they are and published with the rows."
    )
    turns: Policy = Field(
        "last",
        description="Which pair of a dialogue the teacher reflects on: the last, the first, or every pair as a row of "
        "its own with the turns before it.",
    )
    system_turn: Literal["keep", "prepend", "quarantine"] = Field(
        "keep",
        description="What happens to a system prompt: keep makes it the first turn of the dialogue, prepend puts it "
        "before the user's first text, quarantine leaves the record out.",
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="The number of records, in file order, after which reading stops; for trial runs.",
    )
    max_chars: int = Field(
        32_000, gt=0, description="The length of the longest record that is used, in characters of all its texts."
    )
    held_out_fraction: float = Field(
        0.02, ge=0, lt=1, description="The share of the records that neither teacher nor training sees."
    )
    split_salt: str = Field("0", description="A text that decides which records are held out.")
    range_bytes: Operational[int] = Field(64 << 20, gt=0, description="The bytes of source that one task reads.")
