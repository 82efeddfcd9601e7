"""A vLLM engine, or its actor, that is killed while it answers: it is replaced, every call gets its reply, once."""

import contextlib
import json
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.parquet_log import write_whole
from operators.teacher.calls import call_key
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import RECORD, Ledger

CALLS, BATCH = 24, 4


def teacher(model: str) -> TeacherConfig:
    return TeacherConfig(
        backend="vllm",
        model=model,
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        batch_rows=BATCH,
        concurrent_batches=1,
    )


def calls(count: int) -> "ray.data.Dataset":
    message = json.dumps([{"role": "user", "content": "Count to one thousand."}])
    table = {
        "row_id": [str(n) for n in range(count)],
        "messages": [message] * count,
        "schema": [""] * count,
        "max_tokens": pa.array([200] * count, pa.int32()),
    }
    return ray.data.from_arrow(pa.table(table))


def kill_after_first_reply(victim: str, folder: Path, killed: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        if not any(folder.glob("*.parquet")):
            continue
        for process in psutil.Process().children(recursive=True):  # other engines of this machine are not ours
            with contextlib.suppress(psutil.NoSuchProcess):
                if victim in " ".join([*process.cmdline(), process.name()]):
                    process.kill()
                    killed.append(process.pid)
                    return


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("victim", ["EngineCore", "ray::VllmEngine"], ids=["engine", "actor"])
def test_a_killed_engine_is_replaced(tmp_path: Path, tiny_model: str, victim: str) -> None:
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_after_first_reply, args=(victim, tmp_path / "stage", killed, stop))
    killer.start()
    try:
        ledger = Ledger(str(tmp_path))
        rows = ledger.answer(calls(CALLS), teacher(tiny_model), "stage").take_all()
    finally:
        stop.set()
        killer.join()
    assert killed, "the engine had answered everything before it could be killed"
    assert len(rows) == CALLS
    assert all(row["reply"] for row in rows)
    records = pa.concat_tables(pq.read_table(file) for file in (tmp_path / "stage").glob("*.parquet"))
    assert records.num_rows - CALLS <= BATCH


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_that_goes_on_starts_its_engine_beside_what_the_ledger_holds(tmp_path: Path, tiny_model: str) -> None:
    """On two CPUs, of which the engine takes one: the anti-join must have ended before the engine starts."""
    patient = teacher(tiny_model).model_copy(update={"no_progress_timeout_s": 240.0})
    store_replies(tmp_path, patient, 2)
    ledger = Ledger(str(tmp_path))
    rows = {row["row_id"]: row["reply"] for row in ledger.answer(calls(4), patient, "stage").take_all()}
    assert rows["0"] == rows["1"] == "one, two"
    assert rows["2"]
    assert rows["3"]
    assert ledger.metrics()["calls"] == 2


def store_replies(folder: Path, asked: TeacherConfig, count: int) -> None:
    """Put into the ledger what an earlier run would have left."""
    said = {"reply": "one, two", "finish_reason": "stop", "prompt_tokens": 9, "generated_tokens": 3, "error": ""}
    records = [
        {"call_key": call_key(call, "stage", asked.key_parts()), "row_id": call["row_id"], **said}
        for call in calls(count).take_all()
    ]
    write_whole(str(folder / "stage"), pa.Table.from_pylist(records, schema=RECORD))
