"""A damaged manifest is an error that names it, and is never read as another result."""

from pathlib import Path

import pytest
from pyarrow import fs

from cluster.files import StorageError
from cluster.manifest import MANIFEST, Manifest, read_manifest
from operators.files.seals import sealed

MADE = Manifest(
    asset="evaluation",
    fingerprint="0123456789abcdef",
    made_from={"code": "1", "inputs": {"student": "a"}},
    seconds=1.5,
    value={"held_out_loss": {"base": 2.825, "student": 2.373}},
)


def read(folder: Path) -> Manifest:
    return read_manifest(fs.LocalFileSystem(), "evaluation", str(folder))


def test_a_sealed_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(sealed(MADE))
    assert read(tmp_path) == MADE


def test_a_flipped_bit_is_never_read_as_another_result(tmp_path: Path) -> None:
    content = sealed(MADE).encode()
    refused = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / MANIFEST).write_bytes(damaged)
        try:
            found = read(tmp_path)
        except StorageError:
            refused += 1
        else:
            assert found == MADE, f"byte {place}"
    assert refused > len(content) // 6, "a flip between two words, or in the name of the seal, changes nothing"


def test_a_changed_number_is_named_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(sealed(MADE).replace("2.373", "2.273"))
    with pytest.raises(StorageError, match=rf"^evaluation: {tmp_path}/{MANIFEST} cannot be read; delete .*_SUCCESS"):
        read(tmp_path)


def test_a_manifest_written_before_seals_existed_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(MADE.model_dump_json())
    assert read(tmp_path) == MADE
