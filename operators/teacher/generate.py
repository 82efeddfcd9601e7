"""The teacher: turns calls (chat messages) into raw replies by vLLM actors, an OpenAI-compatible endpoint, or a script.

The three backends are interchangeable: each is a function `calls -> replies` on Ray Data. Prompts are tokenised here
with the teacher's own chat template and handed to vLLM as token ids, because a prompt rendered to text and tokenised
again gets a second beginning-of-sequence token from several model families.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import ray
from pydantic import Field
from ray.data import Dataset

from operators.calls import REPLIES, call_seed
from operators.guarded_engine import guarded
from operators.openai_endpoint import OpenAIEndpoint
from operators.scripted_teacher import scripted_replies
from operators.stage import StageConfig

ERROR_CHARS = 500
# Of tasks that hold replies which are paid for: a killed one is tried again for as long as the stage goes on. The same
# arguments everywhere, because Ray Data makes one task of steps that have them in common.
WITH_REPLIES: dict[str, Any] = {"num_cpus": 0.25, "max_retries": -1}


class TeacherConfig(StageConfig):
    """Which model answers, how it samples, and what it may use of the cluster."""

    OPERATIONAL = frozenset(
        {
            "replicas",
            "device",
            "cpus_per_replica",
            "tensor_parallel",
            "batch_rows",
            "concurrent_batches",
            "max_num_seqs",
            "cpu_kv_cache_gib",
            "cpu_threads",
            "max_attempts",
            "max_failed_share",
            "no_progress_timeout_s",
            "canary_timeout_s",
            "base_url",
            "api_key_env",
            "concurrent_requests",
            "requests_per_minute",
            "request_timeout_s",
            "max_retries",
        }
    )

    backend: Literal["vllm", "openai", "scripted"] = Field("vllm", description="vllm actors, an endpoint, or the fake")
    model: str = Field(description="folder, hub id or package:<wheel>; for openai the name the endpoint knows")
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, description="on GPUs and endpoints it is part of every call's own seed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(4096, ge=256, description="prompt and reply together, tokens")
    replicas: int | tuple[int, int] = Field(1, description="engines, or (min, max) for an autoscaled pool")
    device: Literal["gpu", "cpu"] = Field("gpu", description="gpu: one for each tensor_parallel rank of a replica")
    cpus_per_replica: float = Field(1, gt=0, description="CPUs an engine without GPUs reserves")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one copy of the weights")
    batch_rows: int = Field(64, ge=1, description="rows handed over, and committed to the ledger, at a time")
    concurrent_batches: int = Field(8, ge=1, description="batches in flight in one engine")
    max_num_seqs: int = Field(256, ge=1, description="sequences an engine decodes at once")
    cpu_kv_cache_gib: int = Field(1, ge=1)
    cpu_threads: int = Field(1, ge=1, description="threads of an engine on CPUs")
    max_attempts: int = Field(3, ge=1, description="calls that failed this often are not made again")
    max_failed_share: float = Field(0.5, ge=0, le=1, description="of a stage's calls; with more failures it stops")
    no_progress_timeout_s: float = Field(
        1800, gt=0, description="a stage without a reply for so long stops; the start of the engine counts"
    )
    canary_timeout_s: float = Field(300, gt=0, description="vllm: for the first token of an engine that has started")
    base_url: str = Field("", description="openai: address of the endpoint, such as http://127.0.0.1:8000/v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="openai: variable that holds the key")
    concurrent_requests: int = Field(16, ge=1, description="openai: most requests in flight, fewer if it complains")
    requests_per_minute: float = Field(0, ge=0, description="openai: of each replica; 0 means no limit")
    request_timeout_s: float = Field(600, gt=0, description="openai: of one attempt")
    max_retries: int = Field(6, ge=0, description="openai: of one call, after 429, 5xx and lost connections")

    def key_parts(self) -> list[str | float | int]:
        """Everything about the teacher that determines a reply; part of every call's key."""
        return [self.backend, *_model_identity(self), self.temperature, self.top_p, self.seed, self.dtype]


def generate(calls: Dataset, teacher: TeacherConfig, supervisor: Any = None) -> Dataset:
    """Answer every call once; a call that fails becomes a row with `error`, never an exception.

    An engine that dies is replaced, and its batch begun again; a supervisor (an actor of `supervisor.Supervisor`) sees
    to it that this has an end.

    Columns in:
        call_key, row_id: str; messages: JSON list of {"role", "content"}; schema: JSON schema of the reply or "";
        max_tokens: int32, of the reply.
    Columns out:
        REPLIES. `reply` is null exactly where `error` is not empty. `finish_reason` is "stop" or "length".
    """
    backends: dict[str, Callable[[Dataset, TeacherConfig, Any], Dataset]] = {
        "vllm": _generate_vllm,
        "openai": _generate_openai,
        "scripted": _generate_scripted,
    }
    return backends[teacher.backend](calls, teacher, supervisor)


@lru_cache(maxsize=4)
def chat_tokenizer(model: str) -> Any:
    """The model's tokenizer, with its chat template; loaded once a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def prompt_token_ids(messages: str, model: str) -> list[int]:
    """Render a call's messages with the model's chat template, up to where the reply begins."""
    ids: list[int] = chat_tokenizer(model).apply_chat_template(
        json.loads(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def num_prompt_tokens(messages: str, teacher: TeacherConfig) -> int:
    """Length of a prompt in the teacher's tokens; a third of its characters where the tokenizer is unknown."""
    if teacher.backend == "vllm":
        return len(prompt_token_ids(messages, teacher.model))
    return len(messages) // 3


def _model_identity(teacher: TeacherConfig) -> list[str]:
    if teacher.backend != "vllm":
        return [teacher.model]
    from operators.models import model_revision

    return [model_revision(teacher.model), str(chat_tokenizer(teacher.model).chat_template)]


def _generate_vllm(calls: Dataset, teacher: TeacherConfig, supervisor: Any) -> Dataset:
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
        engine.__dict__["fn"] = guarded(engine.fn, supervisor, teacher.canary_timeout_s)
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


_ENDPOINT_SETTINGS = {
    "model",
    "base_url",
    "api_key_env",
    "temperature",
    "top_p",
    "concurrent_requests",
    "requests_per_minute",
    "request_timeout_s",
    "max_retries",
}


def _generate_openai(calls: Dataset, teacher: TeacherConfig, _supervisor: Any) -> Dataset:
    return calls.map_batches(
        OpenAIEndpoint,
        fn_constructor_kwargs=teacher.model_dump(include=_ENDPOINT_SETTINGS),
        compute=ray.data.ActorPoolStrategy(size=teacher.replicas if isinstance(teacher.replicas, int) else 1),
        batch_size=teacher.batch_rows,
        batch_format="pyarrow",
        num_cpus=0.5,
    )


def _generate_scripted(calls: Dataset, teacher: TeacherConfig, supervisor: Any) -> Dataset:
    def answer(batch: pa.Table) -> pa.Table:
        replies = scripted_replies(batch.to_pylist(), teacher.model, supervisor)
        return pa.Table.from_pylist(replies, schema=REPLIES)

    return calls.map_batches(answer, batch_size=None, batch_format="pyarrow", **WITH_REPLIES)
