"""A model in a bucket is copied once per node, and again when its files change."""

import os
import time
from pathlib import Path

import pytest

from operators.files.atomic import put_file
from operators.files.copies import pull
from operators.model_copy import COPIES, KEPT_S, MARKER, on_this_disk


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places from which models were copied."""
    seen: list[str] = []
    monkeypatch.setattr("operators.model_copy.pull", lambda place, *rest: (seen.append(place), pull(place, *rest)))
    return seen


def test_a_folder_and_a_hub_id_are_loaded_where_they_are(cache: Path) -> None:
    assert [on_this_disk(model) for model in ("/models/a", "org/name")] == ["/models/a", "org/name"]
    assert not cache.exists()


def test_a_model_of_a_bucket_is_copied_once_and_again_when_it_changed(
    bucket: str, cache: Path, pulls: list[str]
) -> None:
    model = f"{bucket}/runs/students/v1"
    put_file(f"{model}/config.json", "{}")
    put_file(f"{model}/checkpoints/step-1/shard", "large")
    first = on_this_disk(model)
    assert on_this_disk(model) == first
    assert sorted(path.name for path in Path(first).iterdir()) == [MARKER, "config.json"]
    put_file(f"{model}/config.json", '{"new": 1}')
    assert Path(on_this_disk(model), "config.json").read_text() == '{"new": 1}'
    assert pulls == [model, model]


def test_a_copy_that_was_cut_off_is_made_again(bucket: str, cache: Path, pulls: list[str]) -> None:
    put_file(f"{bucket}/v1/config.json", "{}")
    copy = Path(on_this_disk(f"{bucket}/v1"))
    (copy / MARKER).unlink()
    (copy / "config.json").write_text("{")
    assert Path(on_this_disk(f"{bucket}/v1"), "config.json").read_text() == "{}"
    assert len(pulls) == 2


def test_a_copy_that_was_not_used_for_a_day_is_deleted(bucket: str, cache: Path) -> None:
    for version in ("v1", "v2", "v3"):
        put_file(f"{bucket}/{version}/config.json", version)
    old, new = (Path(on_this_disk(f"{bucket}/{version}")) for version in ("v1", "v2"))
    os.utime(old / MARKER, (time.time() - KEPT_S - 1,) * 2)
    on_this_disk(f"{bucket}/v3")
    assert (old.exists(), new.exists()) == (False, True)
    assert len(list((cache / COPIES).glob("*.lock"))) == 2
