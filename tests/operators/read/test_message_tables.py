"""Tables of messages are turned back into trees of messages, in any format and order."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.read import message_tables
from operators.read.config import ReadConfig
from operators.read.message_tables import assembled
from operators.read.read_record import extract
from operators.read.record import Record
from tests.operators.read.source_samples import records_of


def message(name: str, parent: str | None, text: str, rank: float | None = None, **more: Any) -> dict[str, Any]:
    role = more.pop("role", "prompter" if name[-1] == "p" else "assistant")
    kept = {"message_id": name, "parent_id": parent, "user_id": "u", "text": text, "role": role, "lang": "en"}
    return kept | {"rank": rank, "deleted": False, "message_tree_id": name[0]} | more


TABLE = [
    message("a1p", None, "Name a bird."),
    message("a2", "a1p", "A stone.", 1),
    message("a3", "a1p", "A robin.", 0),
    message("a4p", "a3", "And another?"),
    message("a5", "a4p", "A crow."),
    message("b1p", None, "Name a fish."),
    message("b2", "b1p", "A carp.", deleted=True),
    message("b3", "b1p", "A pike."),
]
PAIRS = [("And another?", "A crow."), ("Name a fish.", "A pike.")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def pairs_of(records: list[Record]) -> list[tuple[str, str]]:
    found = [extract(record, ReadConfig(path="x")).exchanges for record in records]
    return [(pair.instruction, pair.response) for pairs in found for pair in pairs if not pair.reason]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.jsonl.gz", "t.csv"])
@pytest.mark.parametrize("range_bytes", [50, 1 << 20])
def test_the_table_gives_the_pairs_of_the_best_paths_in_every_format(
    tmp_path: Path, name: str, range_bytes: int
) -> None:
    records = records_of(write(tmp_path / name, TABLE), range_bytes)
    assert pairs_of(records) == PAIRS
    assert [record.position for record in records] == sorted(record.position for record in records)
    found = extract(records[0], ReadConfig(path="x"))
    assert [turn.content for turn in found.exchanges[0].before] == ["Name a bird.", "A robin."]
    assert {"lang", "prompt: 1 other replies"} <= set(found.unread)
    assert "deleted" not in str(found.unread)


def test_without_ids_of_trees_and_with_mixed_trees_it_is_the_same() -> None:
    rows = [{key: value for key, value in row.items() if key != "message_tree_id"} for row in TABLE]
    for order in ([0, 5, 1, 6, 2, 7, 3, 4], [1, 0, 2, 5, 3, 4, 7, 6]):
        records = assembled(Record(place, rows[index], "") for place, index in enumerate(order))
        assert sorted(pairs_of(list(records))) == sorted(PAIRS)


def test_a_message_without_its_parent_and_one_below_itself_are_bad_records() -> None:
    rows = [
        *TABLE,
        message("c1", "nobody", "Lost."),
        message("d1", "d2", "Round."),
        message("d2", "d1", "And round."),
    ]
    records = list(assembled(Record(place, row, "") for place, row in enumerate(rows)))
    assert [(record.reason, record.raw) for record in records if record.reason] == [
        ("missing_parent", "Lost."),
        ("missing_parent", "Round."),
        ("missing_parent", "And round."),
    ]
    assert pairs_of(records) == PAIRS


def test_trees_are_given_back_when_many_messages_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_tables, "HELD", 3)
    taken = 0

    def rows() -> Any:
        nonlocal taken
        for taken, row in enumerate(TABLE, 1):
            yield Record(taken, row, "")

    records = assembled(rows())
    assert pairs_of([next(records)]) == PAIRS[:1]
    assert taken < len(TABLE)
    assert pairs_of(list(records)) == PAIRS[1:]


def test_bad_lines_are_kept_and_other_tables_pass_unchanged() -> None:
    bad = Record(0, None, "{", "malformed_json")
    rows = [Record(place, row, "") for place, row in enumerate(TABLE, 1)]
    assert pairs_of(list(assembled(iter([bad, *rows])))) == PAIRS
    plain = [bad, Record(1, {"instruction": "a", "output": "b", "message_id": "1"}, "")]
    assert list(assembled(iter(plain))) == plain
    assert list(assembled(iter([]))) == []
    assert list(assembled(iter([bad]))) == [bad]
