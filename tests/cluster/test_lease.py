"""Two runs never write to one storage; a killed run leaves it free."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from cluster.lease import LEASE, LOOKS, StorageBusyError, is_leased, lease

HOLD = """
import sys
from cluster.lease import lease

with lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageBusyError, match=f"another run is writing to {tmp_path}"), lease(str(tmp_path)):
        pass
    holder.kill()
    holder.wait()
    with lease(str(tmp_path)):
        pass


def test_acquiring_the_lease_waits_for_a_process_that_only_checks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LEASE).touch()
    waited: list[float] = []
    with (tmp_path / LEASE).open() as looker:  # as `is_leased` does for a moment, called by the sensor and each scrape
        fcntl.flock(looker, fcntl.LOCK_SH)

        def end_the_look(seconds: float) -> None:
            waited.append(seconds)
            fcntl.flock(looker, fcntl.LOCK_UN)

        monkeypatch.setattr("cluster.lease.time.sleep", end_the_look)
        with lease(str(tmp_path)):
            assert is_leased(str(tmp_path))
        assert len(waited) == 1


def test_a_second_run_on_nfs_finds_the_storage_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS locks as `fcntl` does: a shared lock needs a file open for reading, an exclusive one for writing."""
    plain = fcntl.flock

    def flock(file: TextIO, kind: int) -> None:
        if (kind & fcntl.LOCK_SH and not file.readable()) or (kind & fcntl.LOCK_EX and not file.writable()):
            raise OSError(errno.EBADF, "bad file descriptor")
        plain(file, kind)

    monkeypatch.setattr("cluster.lease.fcntl.flock", flock)
    with lease(str(tmp_path)):
        assert is_leased(str(tmp_path))
        with pytest.raises(StorageBusyError), lease(str(tmp_path)):
            pass
    assert not is_leased(str(tmp_path))


def test_acquiring_the_lease_does_not_wait_for_ever_for_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LEASE).touch()
    waited: list[float] = []
    monkeypatch.setattr("cluster.lease.time.sleep", waited.append)
    with (tmp_path / LEASE).open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        with pytest.raises(StorageBusyError), lease(str(tmp_path)):
            pass
    assert len(waited) == LOOKS
