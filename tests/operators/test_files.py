from pathlib import Path

import pytest
from pyarrow import fs

from operators.files import put_file, swap_folder


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/sub/a.txt", f"file://{tmp_path}/sub/a.txt"):
        put_file(path, "old")
        put_file(path, "näw")
        assert (tmp_path / "sub" / "a.txt").read_text(encoding="utf-8") == "näw"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_file(f"{tmp_path}/a.txt", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        put_file(f"{tmp_path}/a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def folders(root: Path, old: dict[str, str], new: dict[str, str]) -> None:
    for folder, files in ((root / "target", old), (root / "beside", new)):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("old", [{}, {"README.md": "old", "parquet/1.parquet": "old"}])
@pytest.mark.parametrize("is_object_store", [False, True])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, old: dict[str, str], is_object_store: bool) -> None:
    new = {"README.md": "new", "parquet/2.parquet": "new"}
    folders(tmp_path, old, new)
    local = fs.LocalFileSystem()
    filesystem, root = (fs.SubTreeFileSystem(str(tmp_path), local), "") if is_object_store else (local, f"{tmp_path}/")
    (tmp_path / "target" / "parquet").mkdir(parents=True, exist_ok=True)
    swap_folder(filesystem, f"{root}beside", f"{root}target", "README.md")
    assert texts(tmp_path / "target") == new
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
