"""Checksums find each flipped bit and each missing file."""

import zlib
from pathlib import Path

from operators.files.atomic import put_file
from operators.files.checksums import checksums_of, damaged_files


def test_a_flipped_bit_and_a_missing_file_are_named(tmp_path: Path) -> None:
    texts = {"a": "one", "below/b": "two", "c": "three"}
    for name, text in texts.items():
        put_file(f"{tmp_path}/{name}", text)
    noted = checksums_of(str(tmp_path), texts)
    assert noted == {name: f"{zlib.crc32(text.encode()):08x}" for name, text in texts.items()}
    assert damaged_files(str(tmp_path), noted) == []
    (tmp_path / "below" / "b").write_text("twp")
    (tmp_path / "c").unlink()
    assert damaged_files(str(tmp_path), noted) == ["below/b", "c"]
