"""Source files are found wherever they are, and divided into tasks in their order."""

import warnings
from pathlib import Path

import pytest

from operators.read.config import ReadConfig
from operators.read.read_instructions import read_instructions
from operators.read.record_formats import read_records
from operators.read.source_files import files_of_other_splits, list_source_files, plan_pieces, shown


def test_files_are_found_in_folders_globs_and_uris(tmp_path: Path) -> None:
    (tmp_path / "deep" / "_temporary").mkdir(parents=True)
    for name in (
        "b.jsonl",
        "a.json",
        "deep/c.parquet",
        "deep/D.JSONL",
        ".hidden.json",
        "deep/_temporary/x.json",
        "n.xlsx",
    ):
        (tmp_path / name).write_text("{}")

    def names(path: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [file.path for file in list_source_files(path)]
        assert bool(caught) == ("xlsx" in "".join(str(warning.message) for warning in caught))
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
    (tmp_path / "data.xlsx").write_text("a,b")
    with pytest.raises(ValueError, match=r"found .*data\.xlsx"):
        list_source_files(str(tmp_path))
    with pytest.raises(ValueError, match="no files to read"):
        read_instructions(ReadConfig(path="x"), [], frozenset())


def names_of(folder: Path, path: str, split: str = "all") -> list[str]:
    return [file.name for file in list_source_files(path.format(folder=folder), split)]


def test_a_name_is_relative_to_what_the_source_names_and_does_not_change_with_its_neighbours(tmp_path: Path) -> None:
    """A case from practice: one folder per month, where earlier each new folder renamed all older files."""
    for name in ("2026-11/a.jsonl", "2026-12/b.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        assert "2026-11/a.jsonl" in names_of(tmp_path, "{folder}")
    assert names_of(tmp_path, "file://{folder}/") == ["2026-11/a.jsonl", "2026-12/b.jsonl", "c.jsonl"]
    assert names_of(tmp_path, "{folder}/*/?.jsonl") == ["2026-11/a.jsonl", "2026-12/b.jsonl"]
    assert names_of(tmp_path, "{folder}/c.jsonl") == ["c.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "notes.jsonl"], "train", ["notes.jsonl", "train.jsonl"]),
        (
            ["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
            "test",
            ["data/test-00000-of-00001.parquet"],
        ),
        (["train/a.jsonl", "validation/a.jsonl"], "validation", ["validation/a.jsonl"]),
        (["a_dev.jsonl", "a_train.jsonl"], "train", ["a_train.jsonl"]),
        (["test.jsonl"], "train", ["test.jsonl"]),  # no train split: everything
        (
            ["training_day.jsonl", "contest.jsonl", "latest.jsonl"],
            "all",
            ["contest.jsonl", "latest.jsonl", "training_day.jsonl"],
        ),
        (["contest.jsonl", "latest.jsonl"], "train", ["contest.jsonl", "latest.jsonl"]),  # words with "test" in them
    ],
)
def test_one_split_is_read_if_the_names_show_splits(
    tmp_path: Path, names: list[str], split: str, expected: list[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert names_of(tmp_path, "{folder}", split) == expected


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="'validation'; the splits are train"):
        list_source_files(str(tmp_path), "validation")


def test_a_snapshot_of_the_hub_is_read_through_its_links_without_its_metadata(tmp_path: Path) -> None:
    """The layout of `huggingface_hub.snapshot_download`: links into a folder of blobs."""
    snapshot = tmp_path / "datasets--o--n" / "snapshots" / "0a1b"
    blobs = tmp_path / "datasets--o--n" / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("data/train-0.jsonl", "data/test-0.jsonl", "README.md", "dataset_infos.json")):
        (blobs / str(number)).write_text('{"instruction": "a", "output": "b"}')
        (snapshot / name).symlink_to(blobs / str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (file,) = list_source_files(str(snapshot), "train")
    (piece,) = plan_pieces([file.path], 100)[0]
    assert [record.value for record in read_records(piece)] == [{"instruction": "a", "output": "b"}]


def test_only_files_of_lines_are_cut(tmp_path: Path) -> None:
    line = '{"a": "' + "x" * 50 + '"}\n'
    for name, content in {
        "lines.jsonl": line.encode() * 9,
        "array.jsonl": f"[{','.join([line] * 9)}]".encode(),
        "utf16.jsonl": (line * 9).encode("utf-16"),
        "packed.jsonl.gz": line.encode() * 9,
    }.items():
        (tmp_path / name).write_bytes(content)
    cut = {
        task[0].path.rpartition("/")[2]
        for task in plan_pieces([str(f) for f in sorted(tmp_path.iterdir())], 100)
        if task[0].start
    }
    assert cut == {"lines.jsonl"}


def test_files_that_a_split_leaves_out_are_known(tmp_path: Path) -> None:
    """A case from an audit: of these files only the first was read, and nothing named the others."""
    names = ("train.jsonl", "dev_tools_questions.jsonl", "2024-test.jsonl", "part-eval-2.jsonl", "notes.jsonl")
    for name in names:
        (tmp_path / name).write_text("{}")
    found = files_of_other_splits(str(tmp_path), "train")
    assert found == {
        "test": ["2024-test.jsonl", "part-eval-2.jsonl"],
        "validation": ["dev_tools_questions.jsonl"],
    }
    assert files_of_other_splits(str(tmp_path), "all") == {}
