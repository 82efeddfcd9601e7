"""Requests are stored whole and found again, and a damaged file gives one line that says what to do."""

import json
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


@pytest.mark.parametrize(
    "content", ["", "{}", "\x00\x00", '{"key": 3}', '{"key": "2026-11-26-b"}', '{"key": "../../x"}', "flipped"]
)
def test_a_damaged_request_is_one_line_with_its_cure_and_stops_no_other(tmp_path: Path, content: str) -> None:
    requests, file = Requests(str(tmp_path)), tmp_path / "refreshes" / f"{ONE.key}.json"
    requests.put(ONE)
    requests.put(Request(key="2026-11-25"))
    assert requests.damaged() == []
    file.write_text(file.read_text().replace("b.jsonl", "c.jsonl") if content == "flipped" else content)
    assert requests.damaged() == [f"refreshes: {file} holds no request; delete it, and its files are asked for again"]
    assert [request.key for request in requests.all()] == ["2026-11-25"]
    with pytest.raises(StorageError, match="holds no request"):
        requests.get(ONE.key)


@pytest.mark.parametrize("name", ["2026 11", ".x.y", "-a"])
def test_a_file_whose_name_is_no_key_is_damaged(tmp_path: Path, name: str) -> None:
    Requests(str(tmp_path)).put(ONE)
    (tmp_path / "refreshes" / f"{name}.json").write_text(json.dumps({"key": name}))
    assert len(Requests(str(tmp_path)).damaged()) == (not name.startswith("."))


def test_a_request_of_an_older_version_is_read_and_sealed_when_it_is_next_written(tmp_path: Path) -> None:
    requests, file = Requests(str(tmp_path)), tmp_path / "refreshes" / f"{ONE.key}.json"
    requests.put(ONE)
    file.write_text(ONE.model_dump_json())
    assert requests.all() == [ONE]
    assert "seal" in json.loads((requests.put(ONE) and file).read_text())


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
