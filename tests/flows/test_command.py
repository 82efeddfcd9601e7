"""The first word of the command line says what is done; without one the graph is run."""

from pathlib import Path

import pytest

from flows.command import command
from flows.recycle_and_train import GRAPH

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
