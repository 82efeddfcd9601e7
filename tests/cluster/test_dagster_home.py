"""Dagster's run history in a real PostgreSQL server, where one is installed: `apt-get install postgresql`."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from sqlalchemy.exc import OperationalError

from cluster.dagster_home import DRIVER, POSTGRES_VARIABLE, driver_tags, history, open_instance, reap
from cluster.files import StorageError
from cluster.lease import lease
from cluster.local import free_port

PASSWORD = "planted-password-of-the-tests"  # noqa: S105 - of a server that exists only during the test
USER = "postgres"  # PostgreSQL refuses to run as root


def binary(name: str) -> str | None:
    """Find a program of the server, which Debian installs outside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return shutil.which(name) or (str(found[-1]) if found else None)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database on a server that is started for this test, on a free port of 127.0.0.1."""
    initdb, control = binary("initdb"), binary("pg_ctl")
    if initdb is None or control is None:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    pytest.importorskip("dagster_postgres", reason="pip install recycle-and-train[postgres]")
    as_root = os.geteuid() == 0
    folder = Path(f"/tmp/pg-{os.getpid()}")  # the server runs as another user, who cannot read pytest's folders
    folder.mkdir(mode=0o700)
    (folder / "password").write_text(PASSWORD)
    if as_root:
        for path in (folder, folder / "password"):
            shutil.chown(path, USER)
    port = free_port()

    def run(*command: str) -> None:
        done = subprocess.run(
            command, user=USER if as_root else None, cwd=folder, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr

    own = ["--username=dagster", f"--pwfile={folder}/password", "--auth=scram-sha-256", "--no-sync"]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    try:
        run(initdb, *own, f"{folder}/data")
        run(control, "start", "-w", "-t", "120", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options)
        yield f"{DRIVER}dagster:{PASSWORD}@127.0.0.1:{port}/postgres"
        run(control, "stop", "-w", "-m", "immediate", "-D", f"{folder}/data")
    finally:
        shutil.rmtree(folder)


def test_an_address_of_another_database_driver_is_refused_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SQLAlchemy 2.1, `postgresql://` means psycopg 3, which is not installed and does not work with Dagster."""
    monkeypatch.setenv(POSTGRES_VARIABLE, f"postgresql://dagster:{PASSWORD}@db:5432/dagster")
    with pytest.raises(StorageError) as refused:
        open_instance(tmp_path)
    assert str(refused.value) == f"${POSTGRES_VARIABLE}: begin it with {DRIVER}, the driver that Dagster works with"


@pytest.mark.parametrize(
    "damage", ["zun_launcher: {}", "run_launcher: [", b"\xff\xfe"], ids=["key", "cut off", "bytes"]
)
def test_damaged_settings_are_one_line_with_the_cure(
    damage: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's own error lists every known key, in 5,000 characters."""
    monkeypatch.delenv(POSTGRES_VARIABLE, raising=False)
    settings = tmp_path / "dagster.yaml"
    settings.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(StorageError) as refused:
        open_instance(tmp_path)
    words = str(refused.value)
    assert words.startswith(f"{settings} cannot be used (")
    assert words.endswith(f"fix it, or delete {settings} and run again: it is written anew")
    assert len(words) < 600
    assert "\n" not in words


def test_a_damaged_history_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POSTGRES_VARIABLE, raising=False)
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "runs.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match=rf"^the history of runs cannot be read .*; delete {tmp_path} and run again"):
        open_instance(tmp_path)


def test_a_database_that_does_not_answer_is_named_without_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POSTGRES_VARIABLE, f"{DRIVER}dagster:{PASSWORD}@db:5432/dagster")

    def unreachable(folder: str) -> None:
        raise OSError(f"cannot connect to dagster:{PASSWORD}@db")

    monkeypatch.setattr(dg.DagsterInstance, "from_config", unreachable)
    with pytest.raises(StorageError, match=r"^the database of \$DAGSTER_PG_URL does not answer") as refused:
        open_instance(tmp_path)
    assert PASSWORD not in str(refused.value)


@pytest.mark.slow
def test_several_hosts_share_the_history_in_a_real_server(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POSTGRES_VARIABLE, postgres)
    one, other = tmp_path / "one" / "dagster", tmp_path / "other" / "dagster"
    storage = str(tmp_path / "storage")
    tags = driver_tags(storage)
    with open_instance(one) as here:
        run = dg.DagsterRun(job_name="job", tags=tags, status=dg.DagsterRunStatus.STARTED)
        here.add_run(run)
        here.add_dynamic_partitions("refresh", ["base"])
    with open_instance(other) as there, lease(storage):
        assert there.get_dynamic_partitions("refresh") == ["base"]
        assert reap(there, storage) == 1, "its driver, on another host, holds no lease"
    with open_instance(one) as here:
        found = here.get_run_by_id(run.run_id)
        assert found is not None
        assert found.status == dg.DagsterRunStatus.FAILURE
        assert here.daemon_cursor_storage is not None, "cursors of the sensor lie there too"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".db"], "nothing is kept in SQLite"
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("database or disk is full", "the disk of .* is full; free space, then run the same command again"),
        ("database is locked", "is locked by another process; run the same command again"),
        ("database disk image is malformed", "the history of runs cannot be read .*delete .* and run again"),
    ],
)
def test_a_history_that_fails_during_a_run_is_one_line(tmp_path: Path, said: str, told: str) -> None:
    with pytest.raises(StorageError, match=told), history(tmp_path):
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError(said))
