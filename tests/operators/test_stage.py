"""A stage's configuration is frozen and knows its operational keys, and missing columns are named."""

import pytest
from pydantic import Field, ValidationError

from operators.stage import Finding, Operational, StageConfig, require_columns


class Example(StageConfig):
    threshold: float = Field(0.5, description="Of the result.")
    actors: Operational[int] = Field(1, ge=1, description="How fast.")


def test_an_operational_key_takes_no_part_in_the_identity() -> None:
    assert Example.operational() == {"actors"}
    assert Example(actors=4).identity() == Example().identity() == {"threshold": 0.5}
    assert Example(threshold=0.6).identity() != Example().identity()


def test_what_identifies_a_stage_holds_no_credential() -> None:
    class Reads(StageConfig):
        files: list[str] = Field([], description="What.")

    made_from = Reads(files=["s3://key:secret@bucket/x?token=t", "b.jsonl"]).identity()
    assert made_from == {"files": ["s3://…@bucket/x?token=…", "b.jsonl"]}
    assert str(Finding("source.path", "s3://key:secret@bucket is empty")) == "source.path: s3://…@bucket is empty"


def test_an_operational_key_keeps_its_limits() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Example(actors=0)


def test_a_misspelt_key_is_refused_and_nothing_can_be_changed() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Example.model_validate({"treshold": 0.6})
    with pytest.raises(ValidationError, match="frozen"):
        Example().threshold = 0.6  # type: ignore[misc]


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    require_columns("pack", ["row_id"], ["row_id", "input"])
    with pytest.raises(ValueError, match="pack: columns response, row_id are missing; the input has input, output;"):
        require_columns("pack", ["row_id", "response"], ["output", "input"])


def test_a_finding_is_one_line_with_its_key() -> None:
    assert str(Finding("student.model", "no tokenizer")) == "student.model: no tokenizer"
    assert Finding("student.model", "no tokenizer").fatal
