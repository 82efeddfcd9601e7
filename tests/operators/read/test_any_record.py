"""Whatever a record or a file contains, reading raises no error, and no record is lost (property tests)."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operators.outside_text import is_damaged
from operators.read.config import ReadConfig
from operators.read.read_instructions import raw_rows
from operators.read.record import Record
from operators.read.record_fields import NAMES
from operators.read.record_formats import read_records
from operators.read.source_files import READABLE, Piece, plan_pieces

TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\ud83d\x00\x0c\r\x92"), max_size=12)
JSON_TEXT = st.sampled_from(["7", "[]", "[7]", '{"a": 1}', '[["a", "b"]]', '[{"role": "user"}]', "null", "nan"])
LEAF = JSON_TEXT | st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "narrator"]) | LEAF
MESSAGE = st.dictionaries(st.sampled_from(["role", "from", "content", "value", "tool_calls", "replies", "rank"]), ROLE)
VALUE = st.recursive(LEAF | st.lists(MESSAGE, max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
KNOWN = sorted({name for names in NAMES.values() for name in names})
RECORD = st.dictionaries(
    st.sampled_from(KNOWN) | st.sampled_from(["Instruction", "OUTPUT", "id"]) | TEXT, VALUE, max_size=6
)
PIECE = Piece(0, "/a.jsonl", 0, 1)
FAST = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FAST
@given(RECORD | VALUE, st.sampled_from(["last", "first", "every"]), st.sampled_from(["keep", "prepend", "quarantine"]))
def test_any_record_gives_rows_that_can_be_written(value: object, turns: str, system_turn: str) -> None:
    config = ReadConfig.model_validate(
        {"path": "x", "turns": turns, "system_turn": system_turn, "pass_through": ["id"]}
    )
    rows = raw_rows(PIECE, Record(0, value, ""), config, frozenset({"</s>"}))
    assert rows
    assert len({row[0] for row in rows}) == len(rows)
    assert turns == "every" or len(rows) == 1
    for row in rows:
        texts = [text for text in row if isinstance(text, str)]
        assert all(text.encode() is not None for text in texts)  # raises if it has half a surrogate pair
        assert row[-3] or not any(is_damaged(text) for text in texts[1:4])
        for listed in (row[4], row[5], row[6], row[7]):
            assert listed == "" or json.loads(str(listed)) is not None


@FAST
@given(st.lists(RECORD, max_size=6))
def test_as_many_records_come_out_as_lines_go_in(tmp_path_factory, records: list[object]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in [{"first": "line"}, *records]))
    for range_bytes in (20, 1 << 20):
        pieces = [piece for task in plan_pieces([str(path)], range_bytes) for piece in task]
        assert sum(1 for piece in pieces for _ in read_records(piece)) == 1 + len(records)


@FAST
@given(
    st.binary(max_size=300) | st.text(max_size=100).map(str.encode),
    st.sampled_from(READABLE),
    st.sampled_from(["", ".gz", ".zst"]),
)
def test_any_bytes_under_any_name_raise_nothing(tmp_path_factory, content: bytes, kind: str, packing: str) -> None:  # type: ignore[no-untyped-def]
    path: Path = tmp_path_factory.mktemp("bytes") / f"a.{kind}{packing}"
    path.write_bytes(content)
    assert all(isinstance(record, Record) for record in read_records(Piece(0, str(path), 0, len(content))))
