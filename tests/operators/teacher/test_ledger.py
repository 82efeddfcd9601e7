"""No call is paid twice: not for equal calls, after crashes, with rows that kill the engine, or with cut-off files."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.parquet_log import write_whole
from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.calls import call_key, failed, replies_table
from operators.teacher.config import TeacherConfig
from operators.teacher.dispatch import TeacherStoppedError
from operators.teacher.failures import CRASHED, CUT_TEXTLESS
from operators.teacher.ledger import Ledger
from operators.teacher.supervisor import Supervisor

TEACHER = TeacherConfig(backend="scripted", model="fluent", batch_rows=4)
SCHEMA = json.dumps({"properties": {"better_response": {"type": "string"}}})


def calls(*row_ids: str, asked: bool = True, prompt: str = "improve") -> "ray.data.Dataset":
    message = json.dumps([{"role": "user", "content": prompt}])
    size = len(row_ids)
    table = {
        "row_id": list(row_ids),
        "kept": [f"text of {row_id}" for row_id in row_ids],
        "messages": pa.array([message if asked else None] * size, pa.string()),
        "schema": [SCHEMA] * size,
        "max_tokens": pa.array([64] * size, pa.int32()),
    }
    return ray.data.from_arrow(pa.table(table))


def rows_of(dataset: "ray.data.Dataset") -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in dataset.take_all()}


def paid(ledger: Ledger) -> tuple[float, float]:
    figures = ledger.metrics()
    return figures["calls"], figures["cached_calls"]


def test_what_failed_stages_have_paid_counts_for_the_budget_of_all_runs(tmp_path: Path) -> None:
    """A reasoning teacher whose thoughts take the whole limit, as the daemon tries it again and again."""
    budget, paid = BudgetConfig(max_tokens=1000), Tokens()

    async def run(ledger: Ledger) -> Tokens:
        spent = ledger.tokens()
        supervisor = Supervisor(budget, spent, 100, max_failed_share=0.5)
        number = await supervisor.admit([str(key) for key in range(30)], [Tokens(4, 16)] * 30)
        replies = [failed({"call_key": str(key), "row_id": ""}, CUT_TEXTLESS, 4, 16) for key in range(number)]
        if replies:
            await supervisor.settle(replies, write_whole(f"{tmp_path}/stage", replies_table(replies)))
        assert await supervisor.conclude()
        ledger.files.discount(await supervisor.discounted_files())
        return (await supervisor.totals()).used

    for _ in range(4):
        paid += asyncio.run(run(Ledger(str(tmp_path), budget)))
        assert Ledger(str(tmp_path)).tokens() == paid
    assert paid == Tokens(4 * 50, 16 * 50)
    assert Ledger(str(tmp_path)).tokens("stage") == Tokens()  # no record counts as a call


@pytest.mark.usefixtures("local_ray")
class TestAnswer:
    def test_every_row_gets_its_own_reply_and_keeps_its_columns(self, tmp_path: Path) -> None:
        rows = rows_of(Ledger(str(tmp_path)).answer(calls(*"abcdefghij"), TEACHER, "stage"))
        assert sorted(rows) == list("abcdefghij")
        assert rows["c"]["kept"] == "text of c"
        assert all(json.loads(row["reply"])["better_response"] for row in rows.values())
        assert not {"messages", "schema", "max_tokens", "call_key"} & set(rows["a"])

    def test_what_was_asked_is_kept_by_the_key_of_the_call(self, tmp_path: Path) -> None:
        ledger = Ledger(str(tmp_path / "ledger"), prompts=str(tmp_path / "prompts"))
        ledger.answer(calls(*"abcdefg", prompt="improve it"), TEACHER, "stage")
        [kept, stored] = [
            pa.concat_tables(pq.read_table(file) for file in (tmp_path / name / "stage").glob("*.parquet"))
            for name in ("prompts", "ledger")
        ]
        assert sorted(kept["call_key"].to_pylist()) == sorted(stored["call_key"].to_pylist())
        assert json.loads(kept["messages"][0].as_py())[0]["content"] == "improve it"

    def test_the_files_of_prompts_are_merged_as_those_of_replies_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("operators.parquet_log.COMPACT_ABOVE", 1)
        ledger = Ledger(str(tmp_path / "ledger"), prompts=str(tmp_path / "prompts"))
        one_by_one = TEACHER.model_copy(update={"batch_rows": 1})
        before = rows_of(ledger.answer(calls(*"abc"), one_by_one, "stage"))
        for name in ("prompts", "ledger"):
            [merged] = (tmp_path / name / "stage").iterdir()
            assert pq.read_metadata(merged).num_rows == 3
        assert rows_of(ledger.answer(calls(*"abc"), TEACHER, "stage")) == before
        assert paid(ledger) == (3, 3)

    def test_a_larger_context_pays_again_only_for_what_the_smaller_one_cut_off(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls(*"abc"), TEACHER, "stage"))
        [file] = (tmp_path / "stage").iterdir()
        records = pq.read_table(file).to_pylist()
        assert {record.pop("max_model_len") for record in records} == {4096}
        cut = {"reply": "cut o", "finish_reason": "length", "prompt_tokens": 4090, "generated_tokens": 6}
        records = [record | (cut if record["row_id"] == "b" else {}) for record in records]
        pq.write_table(pa.Table.from_pylist(records), file)  # as in older ledgers, which did not record the limit
        ledger, teacher = Ledger(str(tmp_path)), TEACHER.model_copy(update={"max_model_len": 8192})
        assert rows_of(ledger.answer(calls(*"abc"), teacher, "stage")) == first
        assert paid(ledger) == (1, 2)

    def test_another_reply_length_pays_again_only_for_what_the_smaller_one_cut_off(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls(*"abc"), TEACHER, "stage"))
        [file] = (tmp_path / "stage").iterdir()
        cut = {"reply": "cut o", "finish_reason": "length", "generated_tokens": 64}
        records = [record | (cut if record["row_id"] == "b" else {}) for record in pq.read_table(file).to_pylist()]
        pq.write_table(pa.Table.from_pylist(records), file)
        paid_for, replies = [], []
        for limit in (128, 96):
            ledger = Ledger(str(tmp_path))
            teacher = TEACHER.model_copy(update={"max_tokens": limit})
            rows = rows_of(ledger.answer(calls(*"abc"), teacher, "stage"))
            paid_for.append(paid(ledger))
            replies.append({row_id: row["reply"] for row_id, row in rows.items()})
        assert paid_for == [(1, 2), (0, 3)]
        assert all(found["a"] == first["a"]["reply"] and found["b"].startswith("{") for found in replies)

    def test_second_run_makes_no_call_and_gives_the_same_replies(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage"))
        ledger = Ledger(str(tmp_path))
        assert rows_of(ledger.answer(calls("a", "b"), TEACHER, "stage")) == first
        assert paid(ledger) == (0, 2)

    def test_rows_that_are_not_asked_pass_through_without_a_reply(self, tmp_path: Path) -> None:
        ledger = Ledger(str(tmp_path))
        rows = rows_of(ledger.answer(calls("a", asked=False), TEACHER, "stage"))
        assert rows["a"]["reply"] is None
        assert paid(ledger) == (0, 0)

    def test_failed_calls_are_tried_again_until_the_limit_and_then_left(self, tmp_path: Path) -> None:
        careless = TEACHER.model_copy(update={"model": "careless", "max_attempts": 2})
        row_id = next(
            name for name in map(str, range(1000)) if int(key_of(name, careless)[:8], 16) % 7 == 0
        )  # one that this teacher always fails
        answered_id = next(name for name in map(str, range(1000)) if int(key_of(name, careless)[:8], 16) % 7)
        made, retryable = [], []
        for _ in range(3):
            ledger = Ledger(str(tmp_path))
            row = rows_of(ledger.answer(calls(row_id, answered_id), careless, "stage"))[row_id]
            assert row["reply"] is None
            assert row["error"] == "scripted failure"
            made.append(ledger.metrics()["calls"])
            retryable.append(ledger.metrics()["retryable_calls"])
        assert made == [2, 1, 0]
        assert retryable == [1, 0, 0]

    def test_duplicate_records_and_unfinished_files_do_no_harm(self, tmp_path: Path) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage"))
        [record, *_] = sorted((tmp_path / "stage").glob("*.parquet"))
        pq.write_table(pq.read_table(record), tmp_path / "stage" / "copy.parquet")
        (tmp_path / "stage" / ".half.unfinished").write_bytes(record.read_bytes()[:50])
        assert rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage")) == first

    def test_a_file_that_lost_its_end_is_set_aside_and_its_calls_are_made_again(self, tmp_path: Path) -> None:
        one_by_one = TEACHER.model_copy(update={"batch_rows": 1})
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), one_by_one, "stage"))
        cut, whole = sorted((tmp_path / "stage").glob("*.parquet"))
        cut.write_bytes(cut.read_bytes()[:50])
        ledger = Ledger(str(tmp_path))
        assert rows_of(ledger.answer(calls("a", "b"), TEACHER, "stage")) == first
        assert paid(ledger) == (1, 1)
        assert cut.with_name(f"{cut.name}.broken").is_file()
        assert whole.is_file()

    @pytest.mark.slow
    def test_many_partitions_answer_as_one_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = rows_of(Ledger(str(tmp_path)).answer(calls(*"abcdefghij"), TEACHER, "stage"))
        monkeypatch.setattr("operators.teacher.ledger.ROWS_PER_PARTITION", 4)
        ledger = Ledger(str(tmp_path))
        again = rows_of(ledger.answer(calls(*"abcdefghijk"), TEACHER, "stage"))
        assert {row_id: row for row_id, row in again.items() if row_id != "k"} == first
        assert paid(ledger) == (1, 10)

    @pytest.mark.slow
    def test_few_calls_among_many_records_shuffle_only_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = rows_of(Ledger(str(tmp_path)).answer(calls(*map(str, range(30))), TEACHER, "stage"))
        ledger = Ledger(str(tmp_path))
        asked = rows_of(ledger.answer(calls("7", "29", "new"), TEACHER, "stage"))
        assert paid(ledger) == (1, 2)
        assert {name: asked[name] for name in ("7", "29")} == {name: stored[name] for name in ("7", "29")}

        keys = ray.data.from_arrow(pa.table({"row_id": ["7", "29", "never asked"]}))
        few, num_few = ledger.files.read_for(keys, 3, "stage", ["row_id", "reply"])
        assert num_few == 3
        assert {row["row_id"]: row["reply"] for row in few.take_all()} == {n: stored[n]["reply"] for n in ("7", "29")}
        monkeypatch.setattr("operators.parquet_log.MOST_WANTED", 2)
        every, num_every = ledger.files.read_for(keys, 3, "stage", ["row_id", "reply"])
        assert num_every == every.count() == 31

    def test_missing_column_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ray.exceptions.RayTaskError, match="ledger stage: columns messages are missing"):
            Ledger(str(tmp_path)).answer(calls("a").drop_columns(["messages"]), TEACHER, "stage")


@pytest.mark.usefixtures("local_ray")
class TestWhatStopsTheTeacher:
    @pytest.mark.slow
    def test_a_call_that_kills_the_engine_is_found_and_left_alone(self, tmp_path: Path) -> None:
        mortal = TEACHER.model_copy(update={"model": "mortal"})
        both = calls(*"abcdefghij").union(calls("deadly", prompt="POISON"))
        ledger = Ledger(str(tmp_path))
        rows = rows_of(ledger.answer(both, mortal, "stage"))
        assert [row_id for row_id, row in rows.items() if row["reply"] is None] == ["deadly"]
        assert rows["deadly"]["error"] == CRASHED
        assert ledger.metrics()["failed_calls"] == 1
        again = Ledger(str(tmp_path))
        again.answer(both, mortal, "stage")
        assert paid(again) == (0, 11)

    @pytest.mark.slow
    def test_an_engine_that_dies_of_every_call_is_blamed_instead_of_the_calls(self, tmp_path: Path) -> None:
        mortal = TEACHER.model_copy(update={"model": "mortal"})
        with pytest.raises(TeacherStoppedError, match="stage: the engine crashes on every call"):
            Ledger(str(tmp_path)).answer(calls("a", "b", prompt="POISON"), mortal, "stage")
        assert not Ledger(str(tmp_path)).files.of("stage")

    def test_a_silent_engine_is_given_up_after_a_limit(self, tmp_path: Path) -> None:
        silent = TEACHER.model_copy(update={"model": "silent", "no_progress_timeout_s": 2.0})
        with pytest.raises(TeacherStoppedError, match=r"stage: no reply for teacher.no_progress_timeout_s: 2 s"):
            Ledger(str(tmp_path)).answer(calls("a", "b"), silent, "stage")
        # Its resources are free again, so the next stage runs.
        assert len(rows_of(Ledger(str(tmp_path)).answer(calls(*"abcd"), TEACHER, "other"))) == 4

    @pytest.mark.slow
    def test_too_many_failures_stop_the_stage(self, tmp_path: Path) -> None:
        broken = TEACHER.model_copy(update={"model": "broken"})
        with pytest.raises(TeacherStoppedError, match=r"stage: \d+ of \d+ calls failed.*'scripted failure'"):
            Ledger(str(tmp_path)).answer(calls(*map(str, range(200))), broken, "stage")
        discounted = [*(tmp_path / "stage").glob("*.parquet.discounted")]
        assert 20 <= sum(pq.read_metadata(file).num_rows for file in discounted) < 200
        assert not Ledger(str(tmp_path)).files.of("stage"), "it was the teacher that failed: no row has lost an attempt"

    @pytest.mark.slow
    def test_a_small_stage_is_judged_at_its_end_in_every_run(self, tmp_path: Path) -> None:
        broken = TEACHER.model_copy(update={"model": "broken", "max_attempts": 2})
        for _ in range(4):
            with pytest.raises(TeacherStoppedError, match=r"stage: 3 of 3 calls failed.*'scripted failure'"):
                Ledger(str(tmp_path)).answer(calls("a", "b", "c"), broken, "stage")

    @pytest.mark.slow
    def test_a_budget_is_never_exceeded_and_a_larger_one_goes_on(self, tmp_path: Path) -> None:
        many = calls(*map(str, range(60)))
        budget = BudgetConfig(max_tokens=300)  # a call reserves 64 and the prompt, and uses far less
        one_by_one = TEACHER.model_copy(update={"batch_rows": 1})
        with pytest.raises(TeacherStoppedError, match=r"stage: budget.max_tokens: 300 is reached"):
            Ledger(str(tmp_path), budget).answer(many, one_by_one, "stage")
        used = tokens_in(tmp_path / "stage")
        assert 150 < used <= 300
        made = sum(pq.read_metadata(file).num_rows for file in (tmp_path / "stage").glob("*.parquet"))
        ledger = Ledger(str(tmp_path))
        ledger.answer(many, TEACHER, "stage")
        assert paid(ledger) == (60 - made, made)

    def test_cost_is_limited_like_tokens(self, tmp_path: Path) -> None:
        budget = BudgetConfig(max_cost=1.0, prompt_price=0.0, generated_price=10_000)
        with pytest.raises(TeacherStoppedError, match=r"stage: budget.max_cost: 1 is reached"):
            Ledger(str(tmp_path), budget).answer(calls(*map(str, range(60))), TEACHER, "stage")

    def test_an_offline_ledger_makes_no_call(self, tmp_path: Path) -> None:
        with pytest.raises(TeacherStoppedError, match="the ledger lacks 2 of 2 replies"):
            Ledger(str(tmp_path), offline=True).answer(calls("a", "b"), TEACHER, "stage")
        first = rows_of(Ledger(str(tmp_path)).answer(calls("a", "b"), TEACHER, "stage"))
        assert rows_of(Ledger(str(tmp_path), offline=True).answer(calls("a", "b"), TEACHER, "stage")) == first

    @pytest.mark.slow
    def test_many_files_become_few_with_the_same_records(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one_by_one = TEACHER.model_copy(update={"batch_rows": 1})
        first = rows_of(Ledger(str(tmp_path)).answer(calls(*"abcdef"), one_by_one, "stage"))
        monkeypatch.setattr("operators.parquet_log.COMPACT_ABOVE", 3)
        ledger = Ledger(str(tmp_path))
        assert rows_of(ledger.answer(calls(*"abcdef"), TEACHER, "stage")) == first
        assert paid(ledger) == (0, 6)
        assert len(ledger.files.of("stage")) == 1


def tokens_in(folder: Path) -> int:
    records = pa.concat_tables(pq.read_table(file) for file in folder.glob("*.parquet"))
    return sum(records["prompt_tokens"].to_pylist()) + sum(records["generated_tokens"].to_pylist())


def key_of(row_id: str, teacher: TeacherConfig) -> str:
    message = json.dumps([{"role": "user", "content": "improve"}])
    call = {"row_id": row_id, "messages": message, "schema": SCHEMA, "max_tokens": 64}
    return call_key(call, "stage", teacher.key_parts())
