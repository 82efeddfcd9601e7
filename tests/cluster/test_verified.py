"""A file is compared with its manifest before it is read, and its checksum once."""

import zlib
from pathlib import Path

import pytest
from pyarrow import fs

from cluster import verified
from cluster.files import Part, StorageError
from cluster.manifest import Manifest
from cluster.verified import Verified


def manifest_of(path: Path) -> Manifest:
    content = path.read_bytes()
    checksums = {path.name: f"{zlib.crc32(content):08x}"}
    return Manifest(fingerprint="", files={path.name: len(content)}, checksums=checksums)


def test_each_file_is_read_once_for_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"what was written")
    asked: list[list[str]] = []
    real = verified.checksums
    monkeypatch.setattr(verified, "checksums", lambda *given: (asked.append(given[1]), real(*given))[1])
    right = Verified(fs.LocalFileSystem())
    for _ in range(2):
        assert right.parts("rows", [(str(tmp_path), manifest_of(file))]) == [Part(str(file))]
    assert asked == [[str(file)], []]


@pytest.mark.parametrize(("now", "said"), [(b"what was wrItten", "is damaged"), (b"what", "has 4 bytes")])
def test_another_content_or_size_is_named_with_its_cure(tmp_path: Path, now: bytes, said: str) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"what was written")
    manifest = manifest_of(file)
    file.write_bytes(now)
    with pytest.raises(StorageError, match=rf"rows: {file} {said}.*delete {tmp_path}/_SUCCESS and run again"):
        Verified(fs.LocalFileSystem()).parts("rows", [(str(tmp_path), manifest)])
