"""A published data set can be loaded as its users do, describes itself, and has the recycled rows and no others."""

import json
from pathlib import Path
from typing import Any, get_args

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import yaml

from operators.columns import RECYCLED, RECYCLED_OUTCOMES
from operators.files.atomic import open_filesystem
from operators.files.checksums import damaged_files
from operators.files.copies import files_below, read_text
from operators.publish.publish import (
    DECIDED,
    PublishConfig,
    dataset_card,
    publish,
    published_table,
)
from operators.publish.records import alpaca_table, messages_table
from operators.select.config import Policy

ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "data" / "report_sample.json").read_text()
)["rows"]
BEFORE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello!"},
]
AFTER = [{"role": "user", "content": "Thanks"}]
KEPT = [row for row in ROWS if row["outcome"] in RECYCLED_OUTCOMES]
TALK = KEPT[0]["row_id"]  # this row becomes a dialogue of several turns
LINEAGE: dict[str, Any] = {
    "version": "1",
    "source": {"files": [["a.jsonl", "0123"]]},
    "teacher": {"model": "big", "backend": "vllm"},
    "student": {"model": "small"},
    "outcomes": {"original": 5, "instruction": 5, "response": 5, "both": 9, "dropped:held_out": 4},
}
CONFIG = PublishConfig(title="Ours", license="cc-by-nc-4.0")


def a_dialogue(row: dict[str, Any]) -> dict[str, Any]:
    turns = {"turns_before": json.dumps(BEFORE), "turns_after": json.dumps(AFTER)}
    extra = json.dumps({"topic": row["row_id"][:2], "stars": 4})
    return {"turns_before": "", "turns_after": "", **row, "extra": extra} | (turns if row["row_id"] == TALK else {})


TABLE = pa.Table.from_pylist([a_dialogue(row) for row in ROWS], schema=RECYCLED)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    import ray

    folder = tmp_path_factory.mktemp("published") / "data"
    for _ in range(2):  # the second time replaces the first
        made = publish(ray.data.from_arrow(TABLE).repartition(3), str(folder), LINEAGE, CONFIG)
    assert (made.folder, made.rows, made.alpaca_rows) == (str(folder), len(KEPT), len(KEPT) - 1)
    assert [path.name for path in folder.parent.iterdir()] == ["data"], "nothing is left beside"
    return folder


def test_every_published_file_has_a_checksum_and_pages_have_their_own(local_ray: None, tmp_path: Path) -> None:
    import ray

    made = publish(ray.data.from_arrow(TABLE), f"{tmp_path}/data", LINEAGE, CONFIG)
    assert made.files.keys() == files_below(f"{tmp_path}/data").keys()
    assert damaged_files(f"{tmp_path}/data", made.files) == []
    [file] = (tmp_path / "data" / "parquet").iterdir()
    content = bytearray(file.read_bytes())
    content[100] ^= 1  # in the first page
    file.write_bytes(content)
    assert damaged_files(f"{tmp_path}/data", made.files) == [f"parquet/{file.name}"]
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(file, page_checksum_verification=True)


def test_pandas_loads_every_format(published: Path) -> None:
    table = pd.read_parquet(published / "parquet").set_index("row_id")
    assert len(table) == len(KEPT)
    for row in KEPT:
        assert table.loc[row["row_id"], "instruction"] == row["final_instruction"]
        assert table.loc[row["row_id"], "original_output"] == row["response"]
        assert table.loc[row["row_id"], "topic"] == row["row_id"][:2]
    assert set(table["stars"]) == {4}
    alpaca = pd.concat(pd.read_json(file, lines=True) for file in (published / "alpaca").iterdir())
    assert set(alpaca.columns) == {"instruction", "input", "output", "topic", "stars"}
    assert sorted(alpaca["output"]) == sorted(row["final_response"] for row in KEPT if row["row_id"] != TALK)


def test_datasets_loads_every_format(published: Path, tmp_path: Path) -> None:
    everything = datasets.load_dataset(str(published), cache_dir=str(tmp_path))["train"]
    assert len(everything) == len(KEPT)
    assert {"original_instruction", "response_critique", "messages", "topic"} <= set(everything.column_names)
    loaded = datasets.load_dataset("json", data_files=f"{published}/messages/*.jsonl", cache_dir=str(tmp_path))["train"]
    assert set(loaded.column_names) == {"messages", "topic", "stars"}
    dialogues = [row["messages"] for row in loaded]
    lengths = sorted(len(dialogue) for dialogue in dialogues)
    assert lengths == [2] * (len(KEPT) - 1) + [6]
    users = {dialogue[0]["content"] for dialogue in dialogues}
    with_input = [row for row in KEPT if row["input"]]
    assert with_input
    assert users >= {f"{row['final_instruction']}\n\n{row['input']}" for row in with_input}


def test_a_dialogue_is_published_as_the_same_dialogue() -> None:
    [dialogue] = [turns for turns in messages_table(TABLE, {}, frozenset())["messages"].to_pylist() if len(turns) > 2]
    pair = [
        {"role": "user", "content": KEPT[0]["final_instruction"] + (KEPT[0]["input"] and f"\n\n{KEPT[0]['input']}")},
        {"role": "assistant", "content": KEPT[0]["final_response"]},
    ]
    assert dialogue == [*BEFORE, *pair, *AFTER]
    table = published_table(TABLE, {})
    assert table.filter(pa.compute.equal(table["row_id"], TALK))["messages"].to_pylist() == [dialogue]
    assert alpaca_table(TABLE, {}, frozenset()).num_rows == len(KEPT) - 1


def test_a_publication_that_fails_leaves_what_was_there(local_ray: None, tmp_path: Path) -> None:
    import ray

    folder = tmp_path / "data"
    publish(ray.data.from_arrow(TABLE), str(folder), LINEAGE, CONFIG)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fewer = ray.data.from_arrow(TABLE.slice(0, TABLE.num_rows - 1))
    wrong = LINEAGE | {"outcomes": {"both": 1}}
    for rows, lineage in ((ray.data.from_arrow(TABLE), wrong), (fewer, {})):
        with pytest.raises((ValueError, KeyError)):
            publish(rows, str(folder), lineage, CONFIG)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    publish(
        fewer, str(folder), LINEAGE | {"outcomes": {"both": published_table(TABLE.slice(0, 31), {}).num_rows}}, CONFIG
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "what broke off is gone"


def test_a_folder_that_no_publication_wrote_is_left_alone(local_ray: None, tmp_path: Path) -> None:
    import ray

    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="was not published by a run"):
        publish(ray.data.from_arrow(TABLE), f"{tmp_path}/published", LINEAGE, CONFIG)
    assert [path.name for path in tmp_path.rglob("*")] == ["published", "thesis.tex"]


def test_rows_that_the_lineage_does_not_count_are_an_error(local_ray: None, tmp_path: Path) -> None:
    import ray

    with pytest.raises(ValueError, match=rf"{len(KEPT)} rows were written, the lineage counts 3 recycled rows"):
        publish(ray.data.from_arrow(TABLE), str(tmp_path / "x"), LINEAGE | {"outcomes": {"both": 3}}, CONFIG)


def test_without_recycled_rows_the_data_set_is_empty(local_ray: None, tmp_path: Path) -> None:
    import ray

    none = LINEAGE | {"outcomes": {"dropped:held_out": 4}}
    dropped = TABLE.filter(pa.compute.equal(TABLE["outcome"], "dropped:held_out"))
    assert publish(ray.data.from_arrow(dropped), str(tmp_path / "x"), none, CONFIG).rows == 0
    assert "messages" in pd.read_parquet(tmp_path / "x" / "parquet").columns


def test_the_card_says_licence_counts_and_models_and_keeps_its_form() -> None:
    hostile = PublishConfig(title='Ours"\nlicense: mit\n---', license="cc-by-nc-4.0")
    card = dataset_card(LINEAGE, 24, 23, {"to\npic": "text"}, hostile)
    _, header, text = card.split("---\n", 2)
    read = yaml.safe_load(header)
    assert (read["license"], read["pretty_name"]) == ("cc-by-nc-4.0", hostile.title)
    assert "| both | 9 |" in text
    assert "`big` (vllm)" in text
    assert "`alpaca/` has 23 of the 24 rows" in text
    assert '"to\\npic"' in text


@pytest.mark.parametrize(
    ("select", "decided", "scored"),
    [
        ({"policy": "ifd_rifd"}, "student's own IFD and r-IFD scores", "`small`"),
        ({"policy": "reward", "reward_model": "critic"}, "A reward model decided", "`critic`"),
        ({"policy": "judge"}, "The teacher's own scores, from 1 to 10", ""),
        ({"policy": "none"}, "passed the filters replaced the original", ""),
    ],
)
def test_the_card_says_who_wrote_and_what_decided(select: dict[str, str], decided: str, scored: str) -> None:
    teacher = {"model": "big", "backend": "vllm", "mix": [{"weight": 3}, {"model": "other", "backend": "openai"}]}
    teacher["stages"] = {"judge": {"model": "third"}}
    lineage = LINEAGE | {"configuration": {"select": select}, "teacher": teacher}
    card = dataset_card(lineage, 24, 23, {}, CONFIG)
    assert decided in card
    assert f"| model that scored | {scored} |" in card if scored else "model that scored" not in card
    assert "| teachers | `big` (vllm), `other` (openai), `third` (vllm) |" in card


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ("ifd", ["ifd_original", "ifd_better_instruction", "rifd_selected", "rifd_better_response"]),
        ("none", ["ifd_original", "ifd_better_instruction", "rifd_selected", "rifd_better_response"]),
        ("reward", ["reward_original", "reward_better_instruction", "reward_selected", "reward_better_response"]),
        ("judge", ["judge_original", "judge_better_instruction", "judge_selected", "judge_better_response"]),
    ],
)
def test_scores_are_published_under_the_name_of_their_measure(policy: str, names: list[str]) -> None:
    table = published_table(TABLE, {"reward_original": "text"}, policy)
    assert [name for name in table.column_names if name.partition("_")[0] in ("ifd", "rifd", "judge", policy)] == names
    assert table[names[0]].to_pylist() == [row["ifd_original"] for row in KEPT]
    assert table[names[3]].to_pylist() == [row["rifd_better_response"] for row in KEPT]
    assert ("source_reward_original" in table.column_names) == (policy == "reward")
    lineage = LINEAGE | {"configuration": {"select": {"policy": policy, "reward_model": "m"}}}
    assert (f"`{names[0]}`, `{names[1]}`" in dataset_card(lineage, 24, 24, {}, CONFIG)) == (policy != "none")


def test_the_files_have_the_names_of_the_measure(local_ray: None, tmp_path: Path) -> None:
    import ray

    lineage = LINEAGE | {"configuration": {"select": {"policy": "perplexity"}}}
    publish(ray.data.from_arrow(TABLE), str(tmp_path / "data"), lineage, CONFIG)
    names = set(pd.read_parquet(tmp_path / "data" / "parquet").columns)
    assert names >= {"perplexity_original", "perplexity_selected"}
    assert not any("ifd" in name for name in names)


def test_the_policies_of_the_card_are_those_of_the_configuration() -> None:
    assert set(DECIDED) == set(get_args(Policy))


def test_the_lineage_is_published_beside_the_data(published: Path) -> None:
    assert json.loads((published / "lineage.json").read_text()) == LINEAGE


def test_in_a_bucket_the_card_switches_to_the_new_version_and_the_old_one_goes(bucket: str, local_ray: None) -> None:
    import ray

    place = f"{bucket}/runs/published"

    def version() -> str:
        card = yaml.safe_load((read_text(f"{place}/README.md") or "").split("---")[1])
        return str(card["configs"][0]["data_files"]).removesuffix("/parquet/*.parquet")

    publish(ray.data.from_arrow(TABLE), place, LINEAGE, CONFIG)
    first = version()
    with pytest.raises(ValueError, match="rows were written, the lineage counts"):
        publish(ray.data.from_arrow(TABLE), place, LINEAGE | {"outcomes": {"both": 3}}, CONFIG)
    assert version() == first
    made = publish(ray.data.from_arrow(TABLE), place, LINEAGE, CONFIG)
    assert (made.rows, made.alpaca_rows) == (len(KEPT), len(KEPT) - 1)
    names = files_below(place)
    assert {name.rpartition("/")[0].removeprefix(version()) for name in names} == {
        "",
        "/parquet",
        "/alpaca",
        "/messages",
    }
    assert version() != first
    filesystem, inside = open_filesystem(f"{place}/{version()}/parquet")
    assert pads.dataset(inside, filesystem=filesystem).count_rows() == len(KEPT)
    assert json.loads(read_text(f"{place}/{version()}/lineage.json") or "") == LINEAGE
