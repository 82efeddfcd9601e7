"""A teacher in vLLM actors on the cluster, by ray.data.llm.

Prompts are tokenised here with the teacher's own chat template and handed to vLLM as token ids, because a prompt that
is rendered to text and tokenised again gets a second beginning-of-sequence token from several model families.
"""

from typing import Any

import pyarrow as pa
from ray.data import Dataset

from operators.teacher.calls import ERROR_CHARS, REPLIES, WITH_REPLIES, call_seed
from operators.teacher.config import TeacherConfig
from operators.teacher.prompt_tokens import prompt_token_ids
from operators.teacher.vllm_guard import guarded


def generate_vllm(calls: Dataset, teacher: TeacherConfig, supervisor: Any) -> Dataset:
    """Answer calls by vLLM actors; columns as of `generate`."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    on_cpu = teacher.device == "cpu"
    bundle = {"CPU": teacher.cpus_per_replica} if on_cpu else {"CPU": 1, "GPU": 1}
    config = vLLMEngineProcessorConfig(
        model_source=teacher.model,
        engine_kwargs=_engine_kwargs(teacher, on_cpu=on_cpu),
        runtime_env={"env_vars": _cpu_environment(teacher)} if on_cpu else None,
        placement_group_config={"bundles": [bundle] * teacher.tensor_parallel},
        concurrency=teacher.replicas,
        batch_size=teacher.batch_rows,
        max_concurrent_batches=teacher.concurrent_batches,
        log_engine_metrics=False,
        should_continue_on_error=True,
        # The prompt arrives as token ids, and the engine turns its own tokens into text.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(
        config,
        preprocess=lambda call: _vllm_request(call, teacher),
        postprocess=lambda row: {name: row.get(name) for name in _VLLM_COLUMNS},
        preprocess_map_kwargs={"num_cpus": 0.25},
        postprocess_map_kwargs=WITH_REPLIES,
    )
    if supervisor is not None:
        engine = processor.get_stage_by_name("vLLMEngineStage")
        # By assignment the stage would work out its resources a second time, from arguments that it has used up.
        engine.__dict__["fn"] = guarded(engine.fn, supervisor, teacher.first_token_timeout_s)
    return processor(calls).map_batches(_from_vllm, batch_size=None, batch_format="pyarrow", **WITH_REPLIES)


_VLLM_COLUMNS = (
    "call_key",
    "row_id",
    "max_tokens",
    "generated_text",
    "num_input_tokens",
    "num_generated_tokens",
    "__inference_error__",
)


def _engine_kwargs(teacher: TeacherConfig, *, on_cpu: bool) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "dtype": teacher.dtype,
        "max_model_len": teacher.max_model_len,
        "max_num_seqs": teacher.max_num_seqs,
        "seed": teacher.seed,
        "tensor_parallel_size": teacher.tensor_parallel,
        "load_format": "safetensors",
        "trust_remote_code": False,
        # Compact JSON only: with free white space a small model can print blanks until max_tokens (vllm#8350).
        "structured_outputs_config": {"disable_any_whitespace": True, "backend": "xgrammar"},
        "disable_log_stats": True,
    }
    return kwargs | ({"enforce_eager": True} if on_cpu else {})


def _cpu_environment(teacher: TeacherConfig) -> dict[str, str]:
    """An engine's process tree on CPUs. The model runs in the engine core's own process: vLLM starts one more only to
    set the threads, which are set here.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(teacher.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(teacher.cpu_threads),
    }


def _vllm_request(call: dict[str, Any], teacher: TeacherConfig) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": teacher.temperature,
        "top_p": teacher.top_p,
        "max_tokens": int(call["max_tokens"]),
    }
    if teacher.device == "gpu":  # the CPU engine dies of a seed per request (its generator keeps no offset)
        sampling["seed"] = call_seed(call["call_key"])
    if call["schema"]:
        sampling["structured_outputs"] = {"json": call["schema"]}
    ids = prompt_token_ids(call["messages"], teacher.model)
    return {"prompt": "", "tokenized_prompt": ids, "sampling_params": sampling}


def _from_vllm(batch: pa.Table) -> pa.Table:
    """ray.data.llm reports neither a finish reason nor one schema for good and failed rows; give both."""
    replies = []
    for row in batch.to_pylist():
        error = row.get("__inference_error__") or ""
        generated = row.get("num_generated_tokens") or 0
        replies.append(
            {
                "call_key": row["call_key"],
                "row_id": row["row_id"],
                "reply": None if error else row.get("generated_text"),
                "finish_reason": None if error else ("length" if generated >= row["max_tokens"] else "stop"),
                "prompt_tokens": row.get("num_input_tokens") or 0,
                "generated_tokens": generated,
                "error": str(error)[:ERROR_CHARS],
            }
        )
    return pa.Table.from_pylist(replies, schema=REPLIES)
