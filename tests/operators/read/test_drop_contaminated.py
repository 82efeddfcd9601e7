"""Decontamination: evaluation texts are found in rows and rewrites, wherever they come from; other texts are not."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.columns import HELD_OUT, RAW, conform
from operators.read.drop_contaminated import (
    CONTAMINATED,
    DecontaminateConfig,
    drop_contaminated,
    evaluation_index,
    ngram_hashes,
)

QUESTION = "A train leaves the station at nine and travels north at sixty miles an hour; when does it arrive?"
OTHER = "Explain in two sentences why the sky looks blue on a clear day and red in the evening."
HALF = "A train leaves the station at nine and travels north. Describe the passengers that you can imagine on board."


def rows(**texts: tuple[str, str]) -> "ray.data.Dataset":
    """Rows of id = (instruction, outcome)."""
    table = pa.table(
        {
            "row_id": list(texts),
            "instruction": [text for text, _ in texts.values()],
            "input": [""] * len(texts),
            "outcome": [outcome for _, outcome in texts.values()],
        }
    )
    return ray.data.from_arrow(conform(table, RAW))


def outcomes(found: "ray.data.Dataset") -> dict[str, str]:
    return {row["row_id"]: row["outcome"] for row in found.take_all()}


def test_hashes_see_words_only() -> None:
    assert np.array_equal(ngram_hashes("The cat -- SAT down!", 2), ngram_hashes("the cat sat down", 2))
    assert len(ngram_hashes("the cat sat down", 2)) == 3
    assert len(ngram_hashes("cat", 2)) == 1
    assert len(ngram_hashes("?!", 2)) == 0


@pytest.mark.usefixtures("local_ray")
class TestDropContaminated:
    def test_rows_that_repeat_a_row_held_out_are_dropped(self) -> None:
        source = rows(
            a=(QUESTION, HELD_OUT),
            b=(QUESTION.upper(), ""),
            c=(OTHER, ""),
            d=(HALF, ""),
            e=(QUESTION, "quarantined:too_long"),
        )
        found = outcomes(drop_contaminated(source, None, DecontaminateConfig()))
        expected = {"a": HELD_OUT, "b": CONTAMINATED, "c": "", "d": "", "e": "quarantined:too_long"}
        assert found == expected
        strict = outcomes(drop_contaminated(source, None, DecontaminateConfig(max_overlap=0.1)))
        assert strict == expected | {"d": CONTAMINATED}
        assert outcomes(drop_contaminated(source, None, DecontaminateConfig(held_out=False)))["b"] == ""

    def test_rows_held_out_of_another_refresh_count(self) -> None:
        found = drop_contaminated(rows(a=(QUESTION, "")), rows(z=(QUESTION, HELD_OUT)), DecontaminateConfig())
        assert outcomes(found) == {"a": CONTAMINATED}

    @pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
    def test_files_of_any_format_and_usual_fields_count(self, tmp_path: Path, suffix: str) -> None:
        record = {"question": QUESTION, "answer": "At noon."}
        file = tmp_path / f"evaluation.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist([record]), file)
        else:
            file.write_text(json.dumps([record] if suffix == "json" else record))
        config = DecontaminateConfig(held_out=False, files=[str(file)])
        found = outcomes(drop_contaminated(rows(a=(QUESTION, ""), b=(OTHER, "")), None, config))
        assert found == {"a": CONTAMINATED, "b": ""}

    def test_chats_count_by_what_the_user_says(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": OTHER}]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
        config = DecontaminateConfig(held_out=False, files=[str(tmp_path)])
        found = outcomes(drop_contaminated(rows(a=(QUESTION, ""), b=(OTHER, "")), None, config))
        assert found == {"a": CONTAMINATED, "b": ""}

    def test_a_file_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        config = DecontaminateConfig(files=[str(tmp_path / "none.jsonl")])
        with pytest.raises(ValueError, match=r"none\.jsonl"):
            evaluation_index(rows(a=(OTHER, "")), None, config)

    def test_an_empty_index_contaminates_nothing(self) -> None:
        assert (
            evaluation_index(rows(a=(OTHER, "")), None, DecontaminateConfig()).contaminates([OTHER, ""]) == [False] * 2
        )
