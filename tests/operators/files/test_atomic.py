import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from operators.files.atomic import open_filesystem, put_file, swap_folder, write_file


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
def test_a_folder_takes_the_place_of_another(tmp_path: Path, old: dict[str, str]) -> None:
    new = {"README.md": "new", "parquet/2.parquet": "new"}
    folders(tmp_path, old, new)
    swap_folder(f"{tmp_path}/beside", f"{tmp_path}/target")
    assert texts(tmp_path / "target") == new
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_whose_name_only_resembles_a_replaced_one_stays(tmp_path: Path) -> None:
    folders(tmp_path, {"README.md": "old"}, {"README.md": "new"})
    mine = tmp_path / "target.of-2025.replaced"
    mine.mkdir()
    swap_folder(f"{tmp_path}/beside", f"{tmp_path}/target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", mine.name]


class KilledError(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_swap_that_is_killed_leaves_one_folder_or_the_other_and_the_next_one_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool, step: int
) -> None:
    folders(tmp_path, {"README.md": "old"}, {"README.md": "new"})
    target, renames = tmp_path / "target", iter(range(9))
    rename = Path.replace

    def killed(path: Path, to: Path) -> Path:
        if next(renames) == step:
            raise KilledError
        return rename(path, to)

    if not can_exchange:
        monkeypatch.setattr("operators.files.atomic._exchange", lambda *_: False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        try:
            swap_folder(str(tmp_path / "beside"), str(target))
        except KilledError:
            if can_exchange:
                assert texts(target) in ({"README.md": "old"}, {"README.md": "new"})
    folders(tmp_path, {}, {"README.md": "newer"})
    swap_folder(str(tmp_path / "beside"), str(target))
    assert texts(target) == {"README.md": "newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_old_folder_is_put_back_if_the_next_swap_fails_before_its_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path, {}, {"README.md": "new"})
    folders(tmp_path, {"README.md": "old"}, {})
    (tmp_path / "target").rename(tmp_path / f"target.{'0a' * 16}.replaced")

    def killed(*_: Path) -> bool:
        raise KilledError

    monkeypatch.setattr("operators.files.atomic._exchange", killed)
    with pytest.raises(KilledError):
        swap_folder(str(tmp_path / "beside"), str(tmp_path / "target"))
    assert texts(tmp_path / "target") == {"README.md": "old"}


def read(path: str) -> bytes:
    filesystem, inside = open_filesystem(path)
    with filesystem.open_input_stream(inside) as stream:
        content: bytes = stream.read()
    return content


def test_a_file_system_of_fsspec_is_written_to_as_well() -> None:
    put_file("memory://put_file/deep/er/a.json", "one")
    put_file("memory://put_file/deep/er/a.json", b"two, longer")
    assert read("memory://put_file/deep/er/a.json") == b"two, longer"


@pytest.mark.parametrize("place", ["{folder}", "memory://broken"])
def test_a_function_writes_all_or_nothing(tmp_path: Path, place: str) -> None:
    folder = place.format(folder=tmp_path)
    put_file(f"{folder}/a.parquet", lambda stream: pq.write_table(pa.table({"a": [1, 2]}), stream))
    whole = read(f"{folder}/a.parquet")
    assert pq.read_table(pa.BufferReader(whole)).to_pydict() == {"a": [1, 2]}

    def fail(stream: pa.NativeFile) -> None:
        stream.write(b"half")
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        put_file(f"{folder}/a.parquet", fail)
    filesystem, inside = open_filesystem(folder)
    assert [info.base_name for info in filesystem.get_file_info(fs.FileSelector(inside))] == ["a.parquet"]
    assert read(f"{folder}/a.parquet") == whole


def test_ctrl_c_leaves_an_object_whole() -> None:
    """A stream to an object store stores what it has when it is closed, also if it has nothing yet."""
    stored = {"a.json": b"old"}

    class Stream(io.BytesIO):
        def write(self, content: Any) -> int:
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(content)

        def close(self) -> None:
            if not self.closed:
                stored["a.json"] = self.getvalue()
            super().close()

    store: Any = SimpleNamespace(type_name="s3", open_output_stream=lambda _: Stream())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            write_file(store, "a.json", "new, and all of it")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stored == {"a.json": b"new, and all of it"}


def test_a_relative_path_is_relative_to_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put_file("name.txt", "here")
    assert (tmp_path / "name.txt").read_bytes() == b"here"


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="gopher"):
        open_filesystem("gopher://host/file")


def test_a_function_that_fails_leaves_no_half_object_in_a_bucket(bucket: str) -> None:
    def half(stream: Any) -> None:
        stream.write(b"half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        put_file(f"{bucket}/a", half)
    filesystem, inside = open_filesystem(f"{bucket}/a")
    assert filesystem.get_file_info(inside).type == fs.FileType.NotFound
