"""The question of an evaluation record is found in the formats of the usual benchmarks, or the file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from operators.read.drop_contaminated import DecontaminateConfig, examine_files
from operators.read.evaluation_files import evaluation_texts
from operators.read.record import Record

FIELDS = DecontaminateConfig().fields
ONE = "Write a travel post about a recent trip to Hawaii."
TWO = "Rewrite your post, and begin every sentence with the letter A."


def texts(value: Any, **kept: Any) -> list[str]:
    return evaluation_texts(Record(0, value, "", **kept), FIELDS, 8)


@pytest.mark.parametrize(
    "value",
    [
        {"question": ONE},
        {"Prompt": ONE},
        {"ctx": ONE, "endings": ["a", "b"]},  # HellaSwag
        {"inputs": ONE, "targets": "x"},  # FLAN, BIG-bench
        {"sentence": ONE, "option1": "x"},  # WinoGrande
        {"turns": [ONE]},  # MT-Bench
        {"prompt": [{"role": "user", "content": ONE}]},
        {"messages": json.dumps([{"role": "user", "content": ONE}, {"role": "assistant", "content": "x"}])},
        {"conversation_a": "x", "conversations": [{"from": "human", "value": ONE}]},
    ],
)
def test_the_question_is_found(value: dict[str, Any]) -> None:
    assert texts(value) == [ONE]


def test_turns_are_texts_of_their_own_unless_they_are_short() -> None:
    assert texts({"turns": [ONE, "Thank you!", TWO]}) == [ONE, TWO]
    assert texts({"turns": ["Hello!", "Thank you!"]}) == ["Hello!\nThank you!"]
    assert texts({"instruction": ONE, "input": TWO}) == [f"{ONE}\n{TWO}"]


def test_a_bad_record_has_no_text() -> None:
    assert texts({"question": ONE}, reason="malformed_json") == []
    assert texts([ONE]) == texts({"answer": ONE}) == texts({"question": " ", "messages": "[1"}) == []


def test_a_file_without_any_text_is_refused_with_its_columns(tmp_path: Path) -> None:
    """A case from an audit: such files were accepted, and nothing was compared with them."""
    (tmp_path / "good.jsonl").write_text(json.dumps({"question": ONE}))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"stem": ONE, "meta": {"year": 1}}))
    config = DecontaminateConfig(files=[str(tmp_path)])
    [finding] = examine_files(config)
    assert finding.fatal
    assert str(finding).startswith(f"decontaminate.files: {tmp_path}/bad.jsonl: none of the first 1 records has an")
    assert "its columns are stem, meta" in finding.text
    assert [*examine_files(config.model_copy(update={"fields": [*FIELDS, "stem"]}))] == []
    (tmp_path / "bad.jsonl").write_text('["a"]\n')
    [finding] = examine_files(config)
    assert "no objects" in finding.text
