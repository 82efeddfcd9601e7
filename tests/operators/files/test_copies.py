"""Files are copied whole between a disk and a place, on a disk or in a bucket."""

from pathlib import Path

import pytest

from operators.files.copies import delete, files_below, pull, push, read_text


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, in a bucket or on the disk."""
    return f"{tmp_path}/place" if request.param == "folder" else f"{request.getfixturevalue('bucket')}/a/place"


def test_pushed_files_can_be_pulled(place: str, tmp_path: Path) -> None:
    assert files_below(place) == {}
    (tmp_path / "from/deep").mkdir(parents=True)
    (tmp_path / "from/a.txt").write_text("a")
    (tmp_path / "from/deep/b.bin").write_bytes(b"b" * (9 << 20))
    push(tmp_path / "from", place, ["a.txt", "deep/b.bin"])
    assert {name: info.size for name, info in files_below(place).items()} == {"a.txt": 1, "deep/b.bin": 9 << 20}
    assert read_text(f"{place}/a.txt") == "a"
    pull(place, tmp_path / "to", lambda name: name != "a.txt")
    assert [path.name for path in (tmp_path / "to").rglob("*.*")] == ["b.bin"]
    assert (tmp_path / "to/deep/b.bin").read_bytes() == b"b" * (9 << 20)


def test_deleting_leaves_neighbours_alone(place: str, tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    push(tmp_path, place, ["a/1", "a/2", "b"])
    delete(f"{place}/a")
    assert list(files_below(place)) == ["b"]
    delete(f"{place}/b")
    delete(f"{place}/b")
    assert files_below(place) == {}
    assert read_text(f"{place}/b") is None


def test_a_file_that_cannot_be_read_is_an_error(place: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        push(tmp_path, place, ["nothing"])
