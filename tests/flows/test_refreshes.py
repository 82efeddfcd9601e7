"""`refreshes` and `retry` on storages without refreshes. Storages with refreshes are in test_retries.py."""

import io
from pathlib import Path

import pytest

from flows.refreshes import retry_refresh, show_refreshes


def test_an_empty_storage_has_no_line(tmp_path: Path) -> None:
    out = io.StringIO()
    assert show_refreshes([str(tmp_path)], out) == 0
    assert out.getvalue() == ""


def test_a_refresh_that_was_not_given_up_is_not_retried(tmp_path: Path) -> None:
    err = io.StringIO()
    assert retry_refresh([str(tmp_path), "base"], err=err) == 2
    assert err.getvalue() == "retry: base: no such refresh was given up; given up were: none\n"


def test_a_key_that_could_leave_the_storage_is_not_looked_for(tmp_path: Path) -> None:
    err = io.StringIO()
    assert retry_refresh([str(tmp_path), "../given_up"], err=err) == 2
    assert err.getvalue().startswith("refresh: '../given_up' is not a key; give a letter or digit")


@pytest.mark.parametrize(
    "command", [lambda s, e: show_refreshes([s], err=e), lambda s, e: retry_refresh([s, "k"], err=e)]
)
def test_a_storage_that_is_not_there_is_one_line(tmp_path: Path, command: object) -> None:
    err = io.StringIO()
    assert command(str(tmp_path / "none"), err) == 2  # type: ignore[operator]
    assert "no such folder" in err.getvalue()
