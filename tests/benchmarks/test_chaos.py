"""Lives whose processes are killed keep every promise, and the check finds promises that are broken on purpose."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.chaos import Chaos, table
from benchmarks.chaos_faults import FAULTS
from benchmarks.chaos_life import Life

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_killed_runs_keep_every_promise_and_broken_promises_are_found(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    chaos = Chaos(2, tmp_path, tmp_path, trained_share=0, student=tiny_model)
    try:
        sound = chaos.live(1, [FAULTS["kill driver"]])
        broken = chaos.live(2, [FAULTS["kill worker"]], tamper=break_promises)
    finally:
        chaos.shared.stop()

    assert sound.wrong == []
    assert sound.struck
    assert not Path(sound.storage).exists()  # a life that kept its promises leaves nothing
    found = "\n".join(broken.wrong)
    for sentence in ("1 lost", "stored twice", "left over: ", "published/alpaca holds 0 rows", "other rows than"):
        assert sentence in found, (sentence, found)
    lines = [json.loads(line) for line in (tmp_path / "lives.jsonl").read_text().splitlines()]
    assert [line["wrong"] == [] for line in lines] == [True, False]
    assert "| kill worker | 1 | 1 |" in table(lines)


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
