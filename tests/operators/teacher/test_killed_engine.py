"""A vLLM engine or its actor that is killed while it answers is replaced, and every call gets one reply."""

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


def kill_in_turn(victims: list[str], folder: Path, killed: list[int], stop: threading.Event) -> None:
    """Kill the first victim once a call is answered, and each later one once the next engine has answered a call."""
    held = records_in(folder)
    for victim in victims:
        while records_in(folder) <= held:
            if stop.wait(0.05):
                return
        kill_one(victim, killed)
        held = records_in(folder) + BATCH  # no more were on the engine that died


def records_in(folder: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def kill_one(victim: str, killed: list[int]) -> None:
    for process in psutil.Process().children(recursive=True):  # leaves other engines of this machine alone
        with contextlib.suppress(psutil.NoSuchProcess):
            if victim in " ".join([*process.cmdline(), process.name()]):
                process.kill()
                killed.append(process.pid)
                return


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_killed_engine_and_a_killed_actor_are_replaced(tmp_path: Path, tiny_model: str) -> None:
    """The run continues an earlier one, so the anti-join with the ledger must end before the engine starts.

    There are two CPUs, and the engine takes one of them.
    """
    patient = teacher(tiny_model).model_copy(update={"no_progress_timeout_s": 240.0})
    store_replies(tmp_path, patient, 2)
    killed: list[int] = []
    stop = threading.Event()
    victims = ["EngineCore", "ray::VllmEngine"]
    killer = threading.Thread(target=kill_in_turn, args=(victims, tmp_path / "stage", killed, stop))
    killer.start()
    try:
        ledger = Ledger(str(tmp_path))
        found = ledger.answer(calls(CALLS), patient, "stage").take_all()
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 2, "the engines had answered everything before they could be killed"
    rows = {row["row_id"]: row["reply"] for row in found}
    assert len(found) == len(rows) == CALLS
    assert rows["0"] == rows["1"] == "one, two"
    assert all(rows.values())
    metrics = ledger.metrics()
    assert (metrics["calls"], metrics["cached_calls"], metrics["engine_deaths"]) == (CALLS - 2, 2, 2)
    assert records_in(tmp_path / "stage") - CALLS <= 2 * BATCH


def store_replies(folder: Path, asked: TeacherConfig, count: int) -> None:
    """Store replies in the ledger as an earlier run would have."""
    said = {"reply": "one, two", "finish_reason": "stop", "prompt_tokens": 9, "generated_tokens": 3, "error": ""}
    records = [
        {"call_key": call_key(call, "stage", asked.key_parts()), "row_id": call["row_id"], **said}
        for call in calls(count).take_all()
    ]
    write_whole(str(folder / "stage"), pa.Table.from_pylist(records, schema=RECORD))
