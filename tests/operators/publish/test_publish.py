"""What is published loads as its users load it, says what it is, and holds the recycled rows and no others."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
import ray
import yaml

from operators.columns import RECYCLED, RECYCLED_OUTCOMES
from operators.publish.publish import PublishConfig, dataset_card, publish

ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "data" / "report_sample.json").read_text()
)["rows"]
KEPT = [row for row in ROWS if row["outcome"] in RECYCLED_OUTCOMES]
LINEAGE: dict[str, Any] = {
    "version": "1",
    "source": {"files": [["a.jsonl", "0123"]]},
    "teacher": {"model": "big", "backend": "vllm"},
    "student": {"model": "small"},
    "outcomes": {"original": 5, "instruction": 5, "response": 5, "both": 9, "dropped:held_out": 4},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("published") / "data"
    rows = ray.data.from_arrow(pa.Table.from_pylist(ROWS, schema=RECYCLED)).repartition(3)
    for _ in range(2):  # the second time replaces the first
        made = publish(rows, str(folder), LINEAGE, PublishConfig(title="Ours", license="cc-by-nc-4.0"))
    assert made == {"folder": str(folder), "rows": len(KEPT)}
    return folder


def test_pandas_loads_every_format(published: Path) -> None:
    table = pd.read_parquet(published / "parquet").set_index("row_id")
    assert len(table) == len(KEPT)
    for row in KEPT:
        assert table.loc[row["row_id"], "instruction"] == row["final_instruction"]
        assert table.loc[row["row_id"], "original_output"] == row["response"]
    alpaca = pd.concat(pd.read_json(file, lines=True) for file in (published / "alpaca").iterdir())
    assert set(alpaca.columns) == {"instruction", "input", "output"}
    assert sorted(alpaca["output"]) == sorted(row["final_response"] for row in KEPT)


def test_datasets_loads_every_format(published: Path, tmp_path: Path) -> None:
    everything = datasets.load_dataset(str(published), cache_dir=str(tmp_path))["train"]
    assert len(everything) == len(KEPT)
    assert {"original_instruction", "response_critique"} <= set(everything.column_names)
    loaded = datasets.load_dataset("json", data_files=f"{published}/messages/*.jsonl", cache_dir=str(tmp_path))["train"]
    turns = [row["messages"] for row in loaded]
    assert all([turn["role"] for turn in both] == ["user", "assistant"] for both in turns)
    users = {both[0]["content"] for both in turns}
    with_input = [row for row in KEPT if row["input"]]
    assert with_input
    assert users >= {f"{row['final_instruction']}\n\n{row['input']}" for row in with_input}


def test_the_card_says_licence_counts_and_models_and_keeps_its_form() -> None:
    hostile = PublishConfig(title='Ours"\nlicense: mit\n---', license="cc-by-nc-4.0")
    card = dataset_card(LINEAGE, 24, hostile)
    _, header, text = card.split("---\n", 2)
    read = yaml.safe_load(header)
    assert (read["license"], read["pretty_name"]) == ("cc-by-nc-4.0", hostile.title)
    assert "| both | 9 |" in text
    assert "`big` (vllm)" in text


def test_the_lineage_lies_beside(published: Path) -> None:
    assert json.loads((published / "lineage.json").read_text()) == LINEAGE
