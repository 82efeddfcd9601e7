"""A vLLM engine that is killed while it answers: it is replaced, every call gets its reply, and none is paid twice."""

import json
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.ledger import Ledger
from operators.teacher import TeacherConfig

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


def kill_engine_after_first_reply(folder: Path, killed: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        if not any(folder.glob("*.parquet")):
            continue
        for process in psutil.process_iter(["cmdline", "name"]):
            named = " ".join(process.info["cmdline"] or []) + (process.info["name"] or "")
            if "EngineCore" in named:
                process.kill()
                killed.append(process.pid)
                return


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_engine_is_replaced(tmp_path: Path, tiny_model: str) -> None:
    message = json.dumps([{"role": "user", "content": "Count to one thousand."}])
    calls = pa.table(
        {
            "row_id": [str(n) for n in range(CALLS)],
            "messages": [message] * CALLS,
            "schema": [""] * CALLS,
            "max_tokens": pa.array([400] * CALLS, pa.int32()),
        }
    )
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_engine_after_first_reply, args=(tmp_path / "stage", killed, stop))
    killer.start()
    try:
        ledger = Ledger(str(tmp_path))
        rows = ledger.answer(ray.data.from_arrow(calls), teacher(tiny_model), "stage").take_all()
    finally:
        stop.set()
        killer.join()
    assert killed, "the engine had answered everything before it could be killed"
    assert len(rows) == CALLS
    assert all(row["reply"] for row in rows)
    records = pa.concat_tables(pq.read_table(file) for file in (tmp_path / "stage").glob("*.parquet"))
    assert records.num_rows - CALLS <= BATCH
