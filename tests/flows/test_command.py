"""The first word of the command line selects the command; without one the graph is run."""

import errno
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import command as command_page
from flows.command import command
from flows.recycle_and_train import GRAPH
from flows.refreshes import retry_refresh, show_refreshes
from flows.releases import roll_back

MISSING = "no_such.yaml"


@pytest.mark.parametrize("words", [[], ["run"]])
def test_the_graph_is_run_with_and_without_its_word(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(GRAPH, [*words, "--config", MISSING]) == 2
    assert f"{MISSING}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["browse", "releases", "rollback", "refreshes", "retry", "metrics"])
def test_every_other_word_has_its_own_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(GRAPH, [word, "--help"])
    assert f"usage: recycle-and-train {word}" in capsys.readouterr().out


def test_a_rollback_where_nothing_was_released_is_refused(tmp_path: Path) -> None:
    assert command(GRAPH, ["rollback", str(tmp_path), "v1"]) == 2


def test_the_help_names_every_other_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(GRAPH, ["--help"])
    shown = capsys.readouterr().out.partition("Other commands")[2]
    words = set(re.findall(r"^recycle-and-train ([a-z]+) ", command_page.__doc__ or "", re.MULTILINE))
    assert len(words) > 5
    assert {word for word in words if word not in shown} == set()


@pytest.mark.parametrize(
    ("ask", "words", "code"), [(roll_back, ["v1"], 1), (show_refreshes, [], 2), (retry_refresh, ["a"], 2)]
)
def test_a_storage_that_may_not_be_read_or_written_is_one_line(
    ask: Callable[..., int], words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "place"))

    monkeypatch.setattr("flows.releases.lease", refuse)
    monkeypatch.setattr("flows.refresh_requests.open_filesystem", refuse)
    out, err = io.StringIO(), io.StringIO()
    assert ask([str(tmp_path), *words], out, err) == code
    assert err.getvalue().startswith(f"storage: no permission to write {tmp_path}/place; ")
    assert err.getvalue().count("\n") == 1
