"""A life whose driver is killed keeps every promise, and the check finds promises that are broken on purpose."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.chaos import Chaos, table
from benchmarks.chaos_checks import check
from benchmarks.chaos_faults import FAULTS
from benchmarks.chaos_life import Life

# Long: `make test` kills a whole job in test_bucket.py.
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def test_a_killed_run_keeps_every_promise_and_broken_promises_are_found(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    chaos = Chaos(2, tmp_path, tmp_path, trained_share=0, student=tiny_model)
    before: list[str] = []

    def look_then_break(life: Life) -> None:
        expected = next(iter(chaos.expected.values()))
        before.extend(life.wrong + check(life.storage, life.records, expected, trained=False).wrong)
        break_promises(life)

    try:
        life = chaos.live(1, [FAULTS["kill driver"]], tamper=look_then_break)
    finally:
        chaos.shared.stop()

    assert before == []
    assert life.struck
    found = "\n".join(life.wrong)
    for sentence in ("1 lost", "stored twice", "left over: ", "published/alpaca holds 0 rows", "other rows than"):
        assert sentence in found, (sentence, found)
    [line] = [json.loads(line) for line in (tmp_path / "lives.jsonl").read_text().splitlines()]
    assert line["wrong"] == life.wrong
    assert "| kill driver | 1 | 1 |" in table([line])


def break_promises(life: Life) -> None:
    """Lose a recycled row, store an answer twice, leave a file of a broken build, and empty what is published."""
    storage = Path(life.storage)
    [rows] = (storage / "assets/recycled_instructions/refresh=base").glob("*.parquet")
    kept = pq.read_table(rows, partitioning=None)
    outcomes = kept["outcome"].to_pylist()
    lost = next(number for number, outcome in enumerate(outcomes) if ":" not in outcome)
    pq.write_table(kept.take([number for number in range(kept.num_rows) if number != lost]), rows)
    answers = next((storage / "ledger/reflect_instructions").glob("*.parquet"))
    shutil.copy(answers, answers.with_name("again.parquet"))
    (storage / "assets/held_out/refresh=base/.making").mkdir()
    (storage / "assets/held_out/refresh=base/.making/part.parquet").touch()
    for file in (storage / "published/alpaca").iterdir():
        file.write_text("")
