"""Every record of the source becomes one row, whatever is wrong with it, and always the same row."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from operators import columns
from operators.read.config import ReadConfig
from operators.read.read_instructions import is_held_out, raw_rows, read_instructions
from operators.read.read_record import row_id_of
from operators.read.record import Record
from operators.read.source_files import Piece, list_source_files
from tests.operators.read.reading import GOOD, TOKENS, outcomes, read, rows_of, turns
from tests.operators.read.source_samples import WRITERS, alpaca_like, records_of, write_json, write_jsonl, write_parquet


def fields(**changes: object) -> str:
    return json.dumps(GOOD | changes)


# Pairs of a line of JSONL and its expected outcome.
HOSTILE: list[tuple[bytes, str]] = [
    (fields().encode(), ""),
    (fields(input=None, instruction="no input").encode(), ""),
    (json.dumps({"instruction": "alias", "response": "of output"}).encode(), ""),
    (turns("user", "assistant").encode(), ""),
    (fields(instruction="<|im_<|im_end|>end|>").encode(), ""),
    (b'{"instruction": "cut', "quarantined:malformed_json"),
    (b"[" * 100_000, "quarantined:malformed_json"),
    (b'{"instruction": ' + b"1" * 5_000 + b"}", "quarantined:malformed_json"),
    (b"\x00", "quarantined:malformed_json"),
    (b"[1]", "quarantined:not_an_object"),
    (b"null", "quarantined:not_an_object"),
    (b"{}", "quarantined:missing_field"),
    (fields(output=None).encode(), "quarantined:missing_field"),
    (fields(instruction=7).encode(), "quarantined:non_string_field"),
    (fields(input=["a"]).encode(), "quarantined:non_string_field"),
    (fields(instruction=" \n").encode(), "quarantined:empty_instruction"),
    (fields(instruction="\u200b").encode(), "quarantined:empty_instruction"),
    (fields(output="").encode(), "quarantined:empty_response"),
    (fields(instruction="x" * 1_000_000).encode(), "quarantined:too_long"),
    (fields(output="y" * 32_001).encode(), "quarantined:too_long"),
    (b'{"instruction": "caf\xe9", "output": "x"}', "quarantined:invalid_utf8"),
    (fields(output="a\x00b").encode(), "quarantined:control_characters"),
    (fields(instruction="\x1c").encode(), "quarantined:control_characters"),
    (rb'{"instruction": "lone \ud800", "output": "x"}', "quarantined:control_characters"),
    (turns("user", "assistant", "user", "assistant").encode(), ""),
    (turns("system", "user", "assistant").encode(), ""),
    (turns("user", "user", "assistant").encode(), "quarantined:malformed_messages"),
    (turns("assistant", "user").encode(), "quarantined:malformed_messages"),
    (turns("user").encode(), "quarantined:malformed_messages"),
    (turns().encode(), "quarantined:malformed_messages"),
    (b'{"messages": "hello"}', "quarantined:malformed_messages"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "quarantined:malformed_messages"),
    (fields().encode(), "dropped:duplicate"),
    (fields(output=" Apple.\r\n").encode(), "dropped:duplicate"),
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """All lines of HOSTILE with blank lines between them, which are not records."""
    path = tmp_path / "hostile.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n \r\n".join(line for line, _ in HOSTILE))
    return path


@pytest.mark.usefixtures("local_ray")
def test_every_hostile_line_is_one_row_with_its_own_reason(hostile: Path) -> None:
    rows = read(hostile)
    assert outcomes(rows) == Counter(outcome for _, outcome in HOSTILE)
    assert len({row["row_id"] for row in rows}) == len(HOSTILE)
    for row in rows:
        assert all(isinstance(row[name], str) for name in ("instruction", "input", "response"))
        if str(row["outcome"]).startswith("quarantined"):
            assert all(len(str(row[name])) <= 2_000 for name in ("instruction", "input", "response"))
    assert [row["instruction"] for row in rows if row["escaped"]] == ["<|im_<| im_end |>end|>"]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("range_bytes", [100_000])
def test_byte_ranges_give_the_same_rows_as_one_range(hostile: Path, range_bytes: int) -> None:
    assert read(hostile, range_bytes=range_bytes) == read(hostile)


@pytest.mark.parametrize("range_bytes", [5_000, 99_999])
def test_hostile_lines_are_cut_nowhere(hostile: Path, range_bytes: int) -> None:
    assert records_of(hostile, range_bytes) == records_of(hostile)


@pytest.mark.usefixtures("local_ray")
def test_unreadable_files_are_rows_that_name_the_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", [GOOD])
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1" + b"\x00" * 500)
    broken = write_parquet(tmp_path / "truncated.parquet", alpaca_like(20))
    broken.write_bytes(broken.read_bytes()[:-30])
    rows = read(tmp_path, range_bytes=100)
    assert outcomes(rows) == {"": 1, "quarantined:unreadable_file": 4}
    bad = {Path(str(row["origin"])).name for row in rows if row["outcome"]}
    assert bad == {"empty.parquet", "empty.jsonl", "garbage.parquet", "truncated.parquet"}


def as_layouts(record: dict[str, str]) -> dict[str, dict[str, object]]:
    """One single-turn record without input in the layouts of public data sets."""
    ask, answer = record["instruction"], record["output"]
    return {
        "alpaca": {"instruction": ask, "input": "", "output": answer},
        "dolly": {"instruction": ask, "context": "", "response": answer},
        "completion": {"prompt": ask, "completion": answer},
        "messages": {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]},
        "sharegpt": {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]},
        "capitals": {"Question": ask, "Answer": answer},
    }


@pytest.mark.usefixtures("local_ray")
def test_formats_and_layouts_and_any_order_give_the_same_ids(tmp_path: Path) -> None:
    """All rows are in one source, so a row with another id than its copies would stay."""
    records = [record | {"input": ""} for record in alpaca_like(20)]
    for name, write in WRITERS.items():
        write(tmp_path / name, random.Random(name).sample(records, len(records)))
    for layout in as_layouts(records[0]):
        write_jsonl(tmp_path / f"{layout}.jsonl", [as_layouts(record)[layout] for record in records])  # type: ignore[misc]
    rows = read(tmp_path, held_out_fraction=0.3)
    counts = outcomes(rows)
    assert counts.pop("dropped:duplicate") == 20 * (len(WRITERS) + 6 - 1)
    assert set(counts) == {"", columns.HELD_OUT}
    assert counts.total() == 20


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_first_copy_stays_whichever_block_the_others_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operators.read.read_instructions.SHUFFLED_BLOCK_BYTES", 2_000)
    records = alpaca_like(30)
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", records if number else records[:10] * 2)
    config = ReadConfig(path=str(tmp_path), held_out_fraction=0.3, range_bytes=1_000)
    files = [file.path for file in list_source_files(str(tmp_path))]
    rows = read_instructions(config, files, TOKENS).materialize()
    assert rows.num_blocks() >= 3
    found = rows_of(rows)
    kept = [row for row in found if row["outcome"] != "dropped:duplicate"]
    assert len(found) == 80
    assert len(kept) == 30
    assert len({row["row_id"] for row in found}) == 80
    assert Counter(Path(str(row["origin"])).name for row in kept) == {"0.jsonl": 10, "1.jsonl": 20}
    assert 0 < sum(row["outcome"] == columns.HELD_OUT for row in kept) < 30


@pytest.mark.usefixtures("local_ray")
def test_hash_repartition_gives_one_block_all_rows_of_a_key() -> None:
    """Finding duplicates relies on this in the pinned Ray: no partition is split, even above the block size."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = 2_000
    try:
        keys = ray.data.range(1_200, override_num_blocks=3).map_batches(
            lambda batch: {"key": [str(value % 11) for value in batch["id"]], "text": ["x" * 50] * len(batch["id"])}
        )
        blocks = keys.repartition(3, keys=["key"]).map_batches(
            lambda block: pa.table({"keys": [sorted(set(block["key"].to_pylist()))], "rows": [block.num_rows]}),
            batch_size=None,
            batch_format="pyarrow",
        )
        found = [row for row in blocks.take_all() if row["rows"]]
    finally:
        context.target_max_block_size = before
    assert sum(row["rows"] for row in found) == 1_200
    assert len(found) <= 3
    assert sorted(key for row in found for key in row["keys"]) == sorted(str(key) for key in range(11))


@pytest.mark.usefixtures("local_ray")
def test_the_limit_takes_the_first_records_and_reads_no_further(tmp_path: Path) -> None:
    records = alpaca_like(100)
    write_jsonl(tmp_path / "a.jsonl", records[:30])
    write_json(tmp_path / "b.json", records[30:])
    (tmp_path / "c.jsonl").write_text("never reached")
    rows = read(tmp_path, limit=40, range_bytes=200)
    assert {row["instruction"] for row in rows} == {record["instruction"] for record in records[:40]}
    assert outcomes(rows) == {"": 40}


def test_held_out_rows_follow_id_and_salt_alone() -> None:
    ids = [row_id_of(str(number), "", "") for number in range(4_000)]

    def held_out(**settings: object) -> set[str]:
        config = ReadConfig.model_validate({"path": "x", "held_out_fraction": 0.25, **settings})
        return {row_id for row_id in ids if is_held_out(row_id, config)}

    assert 900 < len(held_out()) < 1_100
    assert held_out() == held_out(range_bytes=1)
    assert len(held_out() & held_out(split_salt="other")) < 350
    assert held_out(held_out_fraction=0.1) < held_out()  # a larger share only adds rows
    assert held_out(held_out_fraction=0) == set()


@pytest.mark.usefixtures("local_ray")
def test_the_demo_source_is_whole() -> None:
    path = Path(__file__).resolve().parents[3] / "configs" / "demo_instructions.jsonl"
    rows = read(path)
    assert outcomes(rows) == {"": 48}
    assert any(row["input"] for row in rows)


@pytest.mark.usefixtures("local_ray")
def test_real_alpaca_records_are_all_accounted_for(alpaca: Path) -> None:
    rows = read(alpaca)
    num_records = len(json.loads(alpaca.read_text(encoding="utf-8")))
    assert len(rows) == num_records
    assert outcomes(rows)[""] > 0.94 * num_records
    assert len(read(alpaca, limit=24)) == 24


def test_a_passed_column_that_is_nested_too_deep_is_a_row_too() -> None:
    text = json.dumps({"instruction": "a", "output": "b", "deep": "here"}).replace('"here"', "[" * 700 + "]" * 700)
    config = ReadConfig(path="a.jsonl", pass_through=["deep"])
    [row] = raw_rows(Piece(0, "a.jsonl", 0, 1), Record(0, json.loads(text), text), config, frozenset())
    assert "quarantined:too_deep" in row
