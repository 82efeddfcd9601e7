"""Requests are stored whole and found again, and a damaged file gives one line that says what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.files import StorageError
from flows.refresh_requests import GivenUp, Request, Requests, named_by
from operators.files.atomic import open_filesystem

ONE = Request(key="2026-11-26-a", files=(("a.jsonl", "1f"), ("b.jsonl", "2f")))


def test_requests_are_kept_replaced_and_forgotten(tmp_path: Path) -> None:
    requests = Requests(str(tmp_path))
    assert requests.all() == []
    assert requests.get(ONE.key) is None
    requests.put(ONE)
    requests.put(Request(key="2026-11-25"))
    given_up = ONE.model_copy(update={"given_up": GivenUp(at="2026", attempts=3, reason="disk", runs=("r1",))})
    requests.put(given_up)
    assert Requests(str(tmp_path)).get(ONE.key) == given_up
    assert [request.key for request in requests.all()] == ["2026-11-25", ONE.key]
    requests.remove(ONE.key)
    requests.remove(ONE.key)
    assert [request.key for request in requests.all()] == ["2026-11-25"]


def test_the_files_of_requests_are_names_with_their_content() -> None:
    assert named_by([ONE]) == {("a.jsonl", "1f"), ("b.jsonl", "2f")}


@pytest.mark.parametrize("content", ["", "{}", "\x00\x00", '{"key": 3}'])
def test_a_damaged_request_is_one_line_with_its_cure(tmp_path: Path, content: str) -> None:
    Requests(str(tmp_path)).put(ONE)
    file = tmp_path / "refreshes" / f"{ONE.key}.json"
    file.write_text(content)
    with pytest.raises(StorageError, match=f"{file} holds no request; delete it"):
        Requests(str(tmp_path)).all()


def test_a_request_that_is_finished_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(str(tmp_path))
    requests.put(ONE)
    requests.put(Request(key="2026-11-25"))

    filesystem, root = open_filesystem(f"{tmp_path}/refreshes")

    def open_input_stream(path: str) -> Any:
        if "2026-11-25" in path:
            raise FileNotFoundError(path)
        return filesystem.open_input_stream(path)

    late = SimpleNamespace(get_file_info=filesystem.get_file_info, open_input_stream=open_input_stream)
    monkeypatch.setattr("flows.refresh_requests.open_filesystem", lambda _: (late, root))
    assert requests.all() == [ONE]
