"""Source files are found wherever they lie, and cut into tasks in their order."""

import warnings
from pathlib import Path

import pytest

from operators.read.read_instructions import ReadConfig, read_instructions
from operators.read.record_formats import read_records
from operators.read.source_files import list_source_files, plan_pieces, shown


def test_files_are_found_in_folders_globs_and_uris(tmp_path: Path) -> None:
    (tmp_path / "deep" / "_temporary").mkdir(parents=True)
    for name in (
        "b.jsonl",
        "a.json",
        "deep/c.parquet",
        "deep/D.JSONL",
        ".hidden.json",
        "deep/_temporary/x.json",
        "n.csv",
    ):
        (tmp_path / name).write_text("{}")

    def names(path: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [file.path for file in list_source_files(path)]
        assert bool(caught) == ("csv" in "".join(str(warning.message) for warning in caught))
        return [path.removeprefix("file://").removeprefix(f"{tmp_path}/") for path in found]

    everything = ["a.json", "b.jsonl", "deep/D.JSONL", "deep/c.parquet"]
    assert names(str(tmp_path)) == names(f"file://{tmp_path}") == names(f"{tmp_path}/") == everything
    assert names(f"{tmp_path}/*.json*") == names(f"file://{tmp_path}/[ab].json*") == ["a.json", "b.jsonl"]
    assert names(f"{tmp_path}/**/*.parquet") == ["deep/c.parquet"]
    assert names(f"{tmp_path}/*/?.parquet") == ["deep/c.parquet"]
    assert names(f"{tmp_path}/a.json") == ["a.json"]
    file = list_source_files(f"{tmp_path}/a.json")[0]
    assert (file.size, file.mtime_ns) == (2, (tmp_path / "a.json").stat().st_mtime_ns)


def test_small_files_share_a_task_in_the_order_given(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(130)]
    for path in paths[1:]:
        Path(path).write_text("{}")
    Path(paths[0]).touch()
    tasks = plan_pieces([*paths, paths[5]], 64 << 20)  # named twice, read once
    assert [len(task) for task in tasks] == [64, 64, 2]
    assert [piece.path for task in tasks for piece in task] == paths


def test_an_fsspec_uri_is_read(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://ingest/a.jsonl", "wb") as file:
        file.write(b'{"instruction": "a"}\n')
    (found,) = list_source_files("memory://ingest")
    (piece,) = plan_pieces([found.path], 100)[0]
    assert [record.value for record in read_records(piece)] == [{"instruction": "a"}]


def test_credentials_in_a_uri_reach_no_row() -> None:
    assert shown("s3://key:secret@bucket/a.jsonl?access_key=1") == "s3://bucket/a.jsonl"
    assert shown("/data/what?@home.jsonl") == "/data/what?@home.jsonl"


def test_a_source_without_readable_files_is_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no file"):
        list_source_files(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="matches no file"):
        list_source_files(str(tmp_path))
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"found .*data\.csv"):
        list_source_files(str(tmp_path))
    with pytest.raises(ValueError, match="no files to read"):
        read_instructions(ReadConfig(path="x"), [], frozenset())
