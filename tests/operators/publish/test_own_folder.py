"""A publication replaces only what a publication wrote."""

import json
from pathlib import Path

import pytest

from operators.files.atomic import put_file
from operators.publish.own_folder import why_foreign

LINEAGE = json.dumps({"source": {}, "teacher": {}, "student": {}, "outcomes": {}, "version": "1"})


@pytest.mark.parametrize("files", [{}, {"lineage.json": LINEAGE, "README.md": "card", "parquet/a.parquet": "rows"}])
def test_an_empty_folder_and_our_own_may_be_replaced(tmp_path: Path, files: dict[str, str]) -> None:
    assert why_foreign(f"{tmp_path}/published") == ""
    (tmp_path / "published").mkdir()
    for name, text in files.items():
        put_file(f"{tmp_path}/published/{name}", text)
    assert why_foreign(f"{tmp_path}/published") == ""


@pytest.mark.parametrize(
    "files", [{"thesis.tex": "years"}, {"lineage.json": "{}", "a": "b"}, {"lineage.json": LINEAGE[:-1]}]
)
def test_a_folder_of_somebody_else_is_named_with_what_is_in_it(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        put_file(f"{tmp_path}/published/{name}", text)
    told = why_foreign(f"{tmp_path}/published")
    assert f"{tmp_path}/published was not published by a run" in told
    assert next(iter(files)) in told
    assert "move it away" in told


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "published").write_text("a list of papers")
    assert "is a file" in why_foreign(f"{tmp_path}/published")


def test_in_a_bucket_only_card_and_versions_are_ours(bucket: str) -> None:
    place = f"{bucket}/runs/published"
    assert why_foreign(place) == ""
    put_file(f"{place}/versions/{'0a' * 16}/parquet/a.parquet", "rows")  # cut off before its card
    assert why_foreign(place) == ""
    put_file(f"{place}/README.md", "card")
    assert why_foreign(place) == ""
    put_file(f"{place}/versions/of-my-thesis/a.tex", "years")
    assert "was not published by a run" in why_foreign(place)
