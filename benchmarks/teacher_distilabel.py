"""Runs distilabel 1.5.3 on the prompts of `teacher.py`, for comparison; needs a Python with distilabel and this vLLM.

distilabel is older than this vLLM. This script fixes only two things. distilabel passes an argument that no longer
exists (`TypeError: Unexpected keyword argument 'logits_processors'`); it is left out if it is empty. When distilabel
unloads the engine, it deletes an attribute that no longer exists (`'LLMEngine' object has no attribute
'model_executor'`) and then waits forever; so the engine just ends with its process.

    <python of distilabel> benchmarks/teacher_distilabel.py CALLS OUT.json
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import teacher

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
BATCH = 16


def main() -> None:
    num_calls, out, model = int(sys.argv[1]), Path(sys.argv[2]), teacher.model()
    mend()
    seconds, tokens, texts = {}, {}, {}
    for count in (teacher.WARM, teacher.SHORT, num_calls):
        rows, seconds[count] = run(count, model)
        tokens[count] = sum(row["distilabel_metadata"]["statistics_ask"]["output_tokens"] for row in rows)
        texts = {row["row_id"]: row["generation"] for row in rows}
    out.write_text(json.dumps(teacher.difference(seconds, tokens, num_calls) | {"texts": texts}))


def mend() -> None:
    import vllm
    from distilabel.models.llms import vLLM

    known = vllm.SamplingParams
    vllm.LLM  # noqa: B018 - loads the modules that name SamplingParams as a type, before it is replaced

    def without_processors(*, logits_processors: list[object], **settings: object) -> object:
        return known(**settings) if not logits_processors else known(logits_processors=logits_processors, **settings)

    vllm.SamplingParams = without_processors
    vLLM._cleanup_vllm_model = lambda self: None


def run(count: int, model: str) -> tuple[list[dict], float]:
    from distilabel.models.llms import vLLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    records = [
        {"row_id": str(number), "instruction": teacher.messages_of(number)[0]["content"]}
        for number in teacher.batch(count)
    ]
    settings = {"max_model_len": teacher.LENGTH, "max_num_seqs": BATCH, "enforce_eager": True}
    with Pipeline(name=f"benchmark-{count}") as pipeline:
        load = LoadDataFromDicts(data=records, batch_size=BATCH)
        ask = TextGeneration(
            name="ask",
            llm=vLLM(
                model=model,
                dtype="float32",
                disable_cuda_device_placement=True,
                extra_kwargs=settings,
                generation_kwargs={"temperature": 0.0, "max_new_tokens": teacher.MAX_TOKENS},
            ),
            input_batch_size=BATCH,
        )
        load >> ask
    started = time.perf_counter()
    made = pipeline.run(use_cache=False)
    return list(made["default"]["train"]), time.perf_counter() - started


if __name__ == "__main__":
    main()
