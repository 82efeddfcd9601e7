"""A storage is told from an empty folder: the daemon must not pay everything again because a mount is missing."""

from pathlib import Path

import pytest

from cluster.files import StorageError
from cluster.lease import lease
from cluster.storage_mark import MARK, require_storage


def test_a_folder_becomes_a_storage_by_its_first_run(tmp_path: Path) -> None:
    storage = str(tmp_path / "storage")
    for _ in range(2):
        with pytest.raises(StorageError, match=f"^storage: {storage} is no storage yet .*; mount its file system"):
            require_storage(storage)
        (tmp_path / "storage").mkdir(exist_ok=True)
    with lease(storage):
        pass
    require_storage(storage)
    first = (tmp_path / "storage" / MARK).read_text()
    with lease(storage):
        pass
    assert (tmp_path / "storage" / MARK).read_text() == first


def test_storages_of_earlier_releases_and_buckets_are_storages(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    require_storage(str(tmp_path))
    require_storage("s3://bucket/prefix")
