"""The page and the schema of the configuration match the code, and every key has a description."""

import json

import jsonschema
import pytest
import yaml
from pydantic import Field

from cluster.runtime import REPOSITORY
from flows.configuration_page import PAGE, SCHEMA, keys_of, page, schema, sections
from operators.stage import Operational, StageConfig

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize(("path", "text"), [(PAGE, page), (SCHEMA, schema)], ids=["page", "schema"])
def test_the_committed_file_is_what_the_code_says(path, text) -> None:
    assert (REPOSITORY / path).read_text(encoding="utf-8") == text(), f"{path} is out of date; run `make docs`"


def test_every_key_has_a_text() -> None:
    assert [f"{section}.{key.name}" for section, model in sections() for key in keys_of(model) if not key.text] == []


def test_every_text_is_a_sentence() -> None:
    texts = [(f"{section}.{key.name}", key.text) for section, model in sections() for key in keys_of(model)]
    assert [
        key for key, text in texts if not (text.endswith(".") and (text[0].isupper() or text[0] in "`0123456789"))
    ] == []


def test_every_key_stands_on_the_page_once() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(1 for _, model in sections() for _ in keys_of(model)) > 120


def test_a_key_is_shown_with_type_default_unit_and_whether_it_is_operational() -> None:
    class Inner(StageConfig):
        width_s: float = Field(1.5, gt=0, le=9, description="Time to wait, in seconds.")

    class Outer(StageConfig):
        """Of a test."""

        names: list[str] = Field(description="Names | of things.")
        inner: Inner = Inner()
        fast: Operational[bool] = Field(True, description="Go fast.")

    names, width, fast = keys_of(Outer)
    assert (names.type, names.default, names.operational) == ("list of text", "required", False)
    assert (width.name, width.type, width.default) == ("inner.width_s", "number, above 0, at most 9", "`1.5`")
    assert width.unit == "seconds"
    assert (fast.type, fast.default, fast.operational, fast.text) == ("true or false", "`true`", True, "Go fast.")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_configurations_and_refuses_mistakes(config) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    validator.validate(values)
    values["train"] = {"max_stepz": 5}
    [error] = validator.iter_errors(values)
    assert "max_stepz" in error.message


def test_an_editor_finds_the_schema_from_each_configuration() -> None:
    for config in CONFIGS:
        assert f"# yaml-language-server: $schema={SCHEMA.name}" in config.read_text(encoding="utf-8"), config
