"""Parts of a column can be selected by a path, and labels are read as their names."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.read.config import ReadConfig
from operators.read.nested_columns import class_labels, paths_below, with_nested
from operators.read.read_record import extract
from operators.read.record import Record
from operators.read.record_fields import is_wanted, missing_fields
from tests.operators.read.source_samples import records_of

SQUAD = {
    "id": "1",
    "context": "Lena moved to Graz.",
    "question": "Where to?",
    "answers": {"text": ["Graz"], "start": [14]},
}


def pair_of(record: object, **columns: str) -> tuple[str, str, str, str]:
    (pair,) = extract(Record(0, record, ""), ReadConfig.model_validate({"path": "x", "columns": columns})).exchanges
    return (*pair.texts, pair.reason)


def test_a_path_names_a_text_inside_a_column() -> None:
    columns = {"response": "answers.text"}
    assert pair_of(SQUAD, **columns) == ("Where to?", "Lena moved to Graz.", "Graz", "")
    found = extract(Record(0, SQUAD, ""), ReadConfig.model_validate({"path": "x", "columns": columns}))
    assert found.unread == ["id"]
    assert is_wanted("answers", columns, ())
    assert missing_fields(SQUAD, {}) == ["response"]
    assert missing_fields(SQUAD, columns) == []
    deep = {"data": {"question": "Who?", "answer": {"text": ["Lena"]}}}
    assert pair_of(deep, instruction="data.question", response="data.answer.text") == ("Who?", "", "Lena", "")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"text": ["Graz", "in Graz"]}, "non_string_field"),
        ({"text": []}, "non_string_field"),
        ({"words": ["Graz"]}, "missing_field"),
        (None, "missing_field"),
        ("Graz", "missing_field"),
    ],
)
def test_a_path_to_nothing_or_to_several_texts_has_a_reason(answers: object, reason: str) -> None:
    assert pair_of(SQUAD | {"answers": answers}, response="answers.text")[3] == reason


def test_a_column_that_has_a_dot_in_its_name_is_itself() -> None:
    record = {"instruction": "a", "answers.text": "b", "answers": {"text": "c"}}
    assert pair_of(record, response="answers.text") == ("a", "", "b", "")
    assert with_nested(record, ["answers.text"]) is record


def test_the_paths_to_texts_are_named() -> None:
    assert paths_below(SQUAD) == ["id", "context", "question", "answers.text"]
    assert paths_below({"a": [{"b": "x"}, {"b": "y"}], "c": {"n": 1}}) == ["a", "c"]


def test_labels_are_read_by_their_names_in_every_table(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict(
        {"instruction": ["I loved it.", "No.", "?"], "output": [1, 0, -1]}, features=features
    )
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "a.parquet", *(tmp_path / "saved").glob("*.arrow")):
        assert [record.value["output"] for record in records_of(file)] == ["good", "bad", None]  # type: ignore[index]


@pytest.mark.parametrize(
    "metadata",
    [None, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": {"features": {"a": 1}}}'}],
)
def test_metadata_of_other_libraries_is_not_a_label(tmp_path: Path, metadata: dict[bytes, bytes] | None) -> None:
    table = pa.table({"instruction": ["a"], "output": [1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    assert class_labels(table.schema) == {}
    assert pair_of(records_of(tmp_path / "a.parquet")[0].value) == ("a", "", "1", "")
