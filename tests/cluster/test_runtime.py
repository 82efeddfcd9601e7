"""Relative paths never end up in a copy of the code that Ray deletes."""

from pathlib import Path

import pytest

from cluster.runtime import anchor

PACKAGE = "/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1234"


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    assert anchor("runs/demo") == str(tmp_path / "runs/demo")


def test_absolute_paths_and_uris_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECYCLE_HOME", "/elsewhere")
    assert anchor("/data/runs") == "/data/runs"
    assert anchor("file:///data/runs") == "/data/runs"


def test_an_object_store_is_refused_without_its_credentials() -> None:
    with pytest.raises(ValueError, match=r"storage: s3://\.\.\.: an object store gives no lease") as error:
        anchor("s3://key:secret@bucket/runs?region=x")
    assert "secret" not in str(error.value)


def test_in_an_uploaded_copy_the_home_is_where_the_cluster_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path(PACKAGE))
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    monkeypatch.setattr("cluster.runtime._folder_of_raylet", lambda: "/home/me/project")
    assert anchor("runs/demo") == "/home/me/project/runs/demo"
    monkeypatch.setenv("RECYCLE_HOME", "/data")
    assert anchor("runs/demo") == "/data/runs/demo"


def test_in_an_uploaded_copy_without_a_home_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path(PACKAGE))
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    monkeypatch.setenv("PWD", "/home/me/project")  # what Ray sets it to is of no use
    with pytest.raises(ValueError, match="storage: 'runs/demo' is relative, and this job runs in an uploaded copy"):
        anchor("runs/demo")
