"""Publishes the recycled data set: Parquet, Alpaca and chat records, a data set card, and its lineage.

    <folder>/parquet/*.parquet     everything: the dialogue, texts before and after, critiques, scores, outcome
    <folder>/messages/*.jsonl      messages: all turns of the dialogue
    <folder>/alpaca/*.jsonl        instruction, input, output: a record per line; only rows without other turns
                                   (both also with the columns that were passed through)
    <folder>/lineage.json          what it was made from: files, prompts, models, configuration, counts
    <folder>/README.md             the card, for people and for `datasets.load_dataset(<folder>)`

Ray Data tasks write one file per block into a temporary folder, which then replaces `<folder>`: a publication that
fails leaves the old one in place. A bucket cannot rename a folder: there all of this lies in
`<folder>/versions/<version>/`, and `<folder>/README.md`, which points `datasets` to it, is replaced last.
"""

import json
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field
from ray.data import Dataset

from operators.columns import RECYCLED, RECYCLED_OUTCOMES
from operators.files.atomic import OBJECT_STORES, UNFINISHED, open_filesystem, swap_folder, write_file
from operators.files.checksums import checksums_of
from operators.files.copies import files_below
from operators.publish.hub import REPOSITORY, push_folder
from operators.publish.own_folder import CARD, LINEAGE, VERSIONS, why_foreign
from operators.publish.pass_through import Kinds, kinds_of, with_pass_through
from operators.publish.records import MESSAGES, dialogues, recycled, write_records
from operators.stage import StageConfig, require_columns

TEMPLATE = "dataset_card.md.j2"
DECIDED = {  # by the policy of the section select: what the card says
    "ifd_rifd": "The student's own IFD and r-IFD scores\ndecided which of them replaced the original.",
    "ifd": "The student's own IFD scores decided which\ninstructions were replaced; every readable response was.",
    "perplexity": "The student's own perplexity decided which of\nthem replaced the original.",
    "reward": "A reward model decided which of them\nreplaced the original.",
    "judge": "The teacher's own scores, from 1 to 10, decided\nwhich of them replaced the original.",
    "none": "Each of them that could be read and\npassed the filters replaced the original.",
}
SCORES = ("ifd_original", "ifd_better_instruction", "rifd_selected", "rifd_better_response")
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
    **{name: name for name in SCORES},
}
OTHER_MEASURES = ("perplexity", "reward", "judge")  # policies whose scores lie in the columns of IFD and r-IFD


class PublishConfig(StageConfig):
    """Configuration of `publish`, the section `publish`."""

    title: str = Field("Recycled instructions", min_length=1, description="Title of the data set card.")
    license: str = Field(
        "unknown", pattern=r"^[\w.+-]+$", description="Licence of the source, as an SPDX id or Hugging Face's own."
    )
    language: list[str] = Field(["en"], description="Languages of the texts as ISO 639 codes.")
    hub_repo: str = Field(
        "",
        pattern=rf"^({REPOSITORY})?$",
        description="Data set repository on a Hugging Face hub, as owner/name, to which the published folder is "
        "pushed; empty pushes nothing. The hub's token and address come from the environment (HF_TOKEN, "
        "HF_ENDPOINT).",
    )
    hub_private: bool = Field(True, description="Whether a repository that the push creates is private.")


class Published(BaseModel):
    """What was published.

    Attributes:
        folder: where it lies.
        rows: rows of the data set.
        alpaca_rows: rows that have an Alpaca record; a dialogue of several turns has none.
        hub_commit: address of the commit on the hub; "" if nothing was pushed.
        files: name below the folder -> CRC-32 of each file; empty if an older version published them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    rows: int
    alpaca_rows: int
    hub_commit: str = ""
    files: dict[str, str] = {}


def publish(rows: Dataset, folder: str, lineage: Mapping[str, Any], config: PublishConfig) -> Published:
    """Write the recycled rows with card and lineage; the old contents of `folder` are replaced once all is written.

    Args:
        rows: columns.RECYCLED; rows that were quarantined or dropped are left out, and counted in the lineage.
        folder: absolute path or URI.
        lineage: what the data was made from, JSON; the card shows its keys source, teacher, student and outcomes.
        config: further entries of the card, and where to push the folder.

    Raises:
        ValueError: a column is missing, the number of rows is not that of the lineage, a push lacks its token, or
            `folder` holds what no publication wrote.
    """
    require_columns("publish", RECYCLED.names, rows.columns() or [])
    if foreign := why_foreign(folder):
        raise ValueError(f"publish: {foreign}")
    filesystem, root = open_filesystem(folder.rstrip("/"))
    version = f"{VERSIONS}/{uuid.uuid4().hex}" if filesystem.type_name in OBJECT_STORES else ""
    beside = f"{root}/{version}" if version else f"{root}{UNFINISHED}"
    if filesystem.get_file_info(beside).type != fs.FileType.NotFound:
        filesystem.delete_dir(beside)  # left by an earlier publication that failed
    filesystem.create_dir(beside, recursive=True)
    policy = _policy(lineage)
    taken = frozenset(published_schema(policy).names)
    kinds = kinds_of(rows, taken)
    num_rows = _write_rows(rows, filesystem, beside, kinds, policy)
    claimed = sum(lineage["outcomes"].get(outcome, 0) for outcome in RECYCLED_OUTCOMES)
    if num_rows != claimed:
        raise ValueError(
            f"publish: {num_rows} rows were written, the lineage counts {claimed} recycled rows; "
            "materialise recycled_instructions again"
        )
    alpaca_rows = write_records(rows, filesystem, beside, kinds, taken)
    write_file(filesystem, f"{beside}/{LINEAGE}", json.dumps(lineage, indent=1, ensure_ascii=False))
    write_file(filesystem, f"{beside}/{CARD}", dataset_card(lineage, num_rows, alpaca_rows, kinds, config))
    if version:
        card = dataset_card(lineage, num_rows, alpaca_rows, kinds, config, f"{version}/")
        _switch(filesystem, root, version, card)
    else:
        swap_folder(beside, root)
    place = f"{root}/{version}".rstrip("/")
    pushed = push_folder(filesystem, place, config.hub_repo, private=config.hub_private) if config.hub_repo else ""
    files = checksums_of(folder, files_below(folder))
    return Published(folder=folder, rows=num_rows, alpaca_rows=alpaca_rows, hub_commit=pushed, files=files)


def _switch(filesystem: fs.FileSystem, root: str, version: str, card: str) -> None:
    """Replace the card, which names the current version, and delete the other versions."""
    write_file(filesystem, f"{root}/{CARD}", card)
    for info in filesystem.get_file_info(fs.FileSelector(f"{root}/{VERSIONS}")):
        if info.base_name != version.rpartition("/")[2]:
            filesystem.delete_dir(info.path)


def dataset_card(
    lineage: Mapping[str, Any], num_rows: int, alpaca_rows: int, kinds: Kinds, config: PublishConfig, below: str = ""
) -> str:
    """The card's Markdown, with the header that `datasets` reads; all values are quoted as JSON, which is valid YAML.

    `below` is the path from the card to the data, empty or with a slash at its end.
    """
    select, policy = lineage.get("configuration", {}).get("select", {}), _policy(lineage)
    environment = Environment(  # noqa: S701 - this is Markdown, and every text from outside is quoted
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(TEMPLATE).render(
        config=config,
        lineage=lineage,
        num_rows=num_rows,
        alpaca_rows=alpaca_rows,
        passed_through=list(kinds),
        below=below,
        teachers=_teachers(lineage["teacher"]),
        decided=DECIDED[policy],
        scores=[] if policy == "none" else [name for old, name in renamed(policy).items() if old in SCORES],
        measure=policy if policy in OTHER_MEASURES else "IFD and r-IFD",
        scored_by={"none": "", "judge": "", "reward": select.get("reward_model", "")}.get(
            policy, lineage["student"]["model"]
        ),
    )


def _teachers(teacher: Mapping[str, Any]) -> list[str]:
    """All that answered, of `mix` and `stages` too, each once."""
    others = [*teacher.get("mix", ()), *teacher.get("stages", {}).values()]
    named = [dict(teacher) | other for other in ([*others] if teacher.get("mix") else [{}, *others])]
    return list(dict.fromkeys(f"`{one['model']}` ({one['backend']})" for one in named))


def _policy(lineage: Mapping[str, Any]) -> str:
    return str(lineage.get("configuration", {}).get("select", {}).get("policy", "ifd_rifd"))


def _write_rows(rows: Dataset, filesystem: fs.FileSystem, folder: str, kinds: Kinds, policy: str) -> int:
    """Write the Parquet files; returns their number of rows, from their footers."""
    take = partial(published_table, kinds=kinds, policy=policy)
    rows.map_batches(take, batch_format="pyarrow", num_cpus=0.25).write_parquet(
        f"{folder}/parquet", filesystem=filesystem, write_page_checksum=True
    )
    found = filesystem.get_file_info(fs.FileSelector(f"{folder}/parquet", allow_not_found=True))
    if not found:  # Ray writes no file if there are no rows; a reader still needs the columns
        filesystem.create_dir(f"{folder}/parquet")
        pq.write_table(published_schema(policy).empty_table(), f"{folder}/parquet/empty.parquet", filesystem=filesystem)
    return int(pads.dataset(f"{folder}/parquet", filesystem=filesystem, format="parquet").count_rows())


def renamed(policy: str) -> dict[str, str]:
    """Column of the rows -> published column. Scores have the name of their measure, as the rows' columns do not."""
    if policy not in OTHER_MEASURES:
        return RENAMED
    return RENAMED | {name: f"{policy}_{name.partition('_')[2]}" for name in SCORES}


def published_schema(policy: str) -> pa.Schema:
    """The published columns of a run with this `select.policy`, without those that were passed through."""
    columns = [RECYCLED.field(name).with_name(new) for name, new in renamed(policy).items()]
    return pa.schema([*columns, ("messages", MESSAGES)])


def published_table(rows: pa.Table, kinds: Kinds, policy: str = "ifd_rifd") -> pa.Table:
    """The recycled rows with the columns of `published_schema`, then the columns that were passed through.

    Args:
        rows: columns.RECYCLED.
        kinds: of the columns that were passed through, from `kinds_of`.
        policy: `select.policy`.
    """
    schema, kept = published_schema(policy), recycled(rows)
    table = kept.select(list(RENAMED)).rename_columns(schema.names[: len(RENAMED)])
    table = table.append_column("messages", dialogues(kept)).cast(schema)
    return with_pass_through(table, kept["extra"], kinds, frozenset(schema.names))
