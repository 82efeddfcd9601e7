"""Which teacher answers, how it samples, and what it may use of the cluster."""

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from operators.redact import without_certain_credentials
from operators.stage import CustomResources, Operational, StageConfig, on_nodes_with
from operators.teacher.prompt_tokens import chat_tokenizer

# Keys of `engine_kwargs` that change an engine's speed and needs, not its replies.
SPEED_ONLY = frozenset(
    {
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "safetensors_load_strategy",
    }
)
# Not allowed in `engine_kwargs`: they have their own keys, or they would run code from elsewhere.
RESERVED = frozenset(
    {
        "allowed_local_media_path",
        "dtype",
        "hf_overrides",
        "load_format",
        "max_model_len",
        "model",
        "reasoning_parser",
        "reasoning_parser_plugin",
        "seed",
        "served_model_name",
        "tensor_parallel_size",
        "tokenizer",
        "trust_remote_code",
        "worker_cls",
        "worker_extension_cls",
    }
)
# Arguments that multiply the processes of an engine; `tensor_parallel` does too.
RANKS = ("pipeline_parallel_size", "prefill_context_parallel_size")
_COPIES = ("data_parallel", "nnodes", "node_rank", "master_")  # beginnings of the names of vLLM's own copies of engines
# Keys that were added later: they are part of a call's key only if they are set, so that older ledgers stay valid.
_LATER = (
    "top_k",
    "min_p",
    "stop",
    "chat_template_kwargs",
    "reasoning_parser",
    "leave_out_parameters",
    "response_format",
    "extra_body",
)
_TOLD = ("stop", "chat_template_kwargs")  # those of them that the model reads: they hold no credentials
_LATER_IDENTITY = (*_LATER, "engine_kwargs", "max_tokens", "stages", "mix")
Parameter = Literal["max_tokens", "temperature", "top_p", "seed", "top_k", "min_p", "stop"]


class TeacherConfig(StageConfig):
    """Which model answers, how it samples, and what it may use of the cluster."""

    backend: Literal["vllm", "openai", "scripted"] = Field(
        "vllm", description="Who answers: vllm actors on the cluster, an OpenAI-compatible endpoint, or a script."
    )
    model: str = Field(description="A folder, a hub id or package:<wheel>; for openai the name the endpoint knows.")
    temperature: float = Field(0.0, ge=0, le=2, description="Temperature of sampling; 0 takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass from which tokens are sampled.")
    top_k: int = Field(0, ge=0, description="Number of most likely tokens that are sampled from; 0 means all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability of a token, as a share of the likeliest's.")
    stop: tuple[str, ...] = Field((), description="Texts that end a reply and are not part of it.")
    seed: int = Field(0, ge=0, description="Seed of sampling; on GPUs and endpoints each call derives its own from it.")
    max_tokens: int | None = Field(
        None, ge=1, description="Longest reply in tokens, instead of reflect.max_tokens and evaluate.judge_max_tokens."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and activations in vllm; auto is the model's own."
    )
    max_model_len: int = Field(4096, ge=256, description="Prompt and reply together, in tokens.")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables of the chat template, such as enable_thinking: false."
    )
    reasoning_parser: str = Field(
        "", description="The vllm reasoning parser that removes thoughts from a reply, such as qwen3; none if empty."
    )
    engine_kwargs: dict[str, Any] = Field(
        {}, description="Further arguments of vLLM's EngineArgs, such as quantization: fp8."
    )
    replicas: Operational[int | tuple[int, int]] = Field(
        1, description="Number of engines, or (min, max) for a pool that grows with its work."
    )
    device: Operational[Literal["gpu", "cpu"]] = Field(
        "gpu", description="Where a vllm engine runs; on gpu, each tensor_parallel rank of a replica takes one GPU."
    )
    cpus_per_replica: Operational[float] = Field(
        1, gt=0, description="Number of CPUs that an engine without GPUs reserves."
    )
    tensor_parallel: Operational[int] = Field(1, ge=1, description="Number of GPUs that share a copy of the weights.")
    custom_resources: CustomResources = on_nodes_with("rank of a vllm engine")
    batch_rows: Operational[int] = Field(64, ge=1, description="Number of rows handed to an engine at a time.")
    concurrent_batches: Operational[int] = Field(8, ge=1, description="Number of batches in flight in one engine.")
    commit_seconds: Operational[float] = Field(
        10, ge=0, description="Longest time in seconds that a reply waits until it is on disk."
    )
    max_num_seqs: Operational[int | None] = Field(
        None,
        ge=1,
        description="Number of sequences that an engine decodes at once; the engine's own choice if not set.",
    )
    cpu_kv_cache_gib: Operational[int] = Field(1, ge=1, description="Size of an engine's cache on CPUs, in GiB.")
    cpu_threads: Operational[int] = Field(1, ge=1, description="Number of threads of an engine on CPUs.")
    max_attempts: Operational[int] = Field(
        3, ge=1, description="Number of times that a failing call is made, over all runs."
    )
    max_failed_share: Operational[float] = Field(
        0.5, ge=0, le=1, description="Largest share of a stage's calls that may fail; with more, the stage stops."
    )
    no_progress_timeout_s: Operational[float] = Field(
        1800, gt=0, description="Time in seconds without a reply after which a stage stops; includes engine starts."
    )
    first_token_timeout_s: Operational[float] = Field(
        300, gt=0, description="Longest time in seconds to the first token of a vllm engine that has started."
    )
    base_url: Operational[str] = Field(
        "", description="Address of the openai endpoint, such as http://127.0.0.1:8000/v1."
    )
    api_key_env: Operational[str] = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key of the openai endpoint."
    )
    tokenizer: Operational[str] = Field(
        "", description="A folder or hub id that counts the openai model's tokens for the budget; bytes if empty."
    )
    concurrent_requests: Operational[int] = Field(
        16,
        ge=1,
        description="Largest number of openai requests in flight per replica; fewer if the endpoint is overloaded. A "
        "vLLM server takes hundreds.",
    )
    requests_per_minute: Operational[float] = Field(
        0, ge=0, description="Largest number of openai requests per minute and replica; 0 means no limit."
    )
    request_timeout_s: Operational[float] = Field(
        600, gt=0, description="Longest time in seconds of one attempt of an openai request."
    )
    max_retries: Operational[int] = Field(
        6, ge=0, description="Number of further attempts of an openai request after 429, 5xx and lost connections."
    )
    rename_parameters: Operational[dict[Parameter, str]] = Field(
        {}, description="Other names of openai request parameters, such as max_tokens: max_completion_tokens."
    )
    leave_out_parameters: tuple[Parameter, ...] = Field(
        (), description="Parameters that openai requests do not carry, such as temperature and seed."
    )
    response_format: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="How an openai request asks for JSON; json_object and none rely on the prompt."
    )
    extra_body: dict[str, Any] = Field({}, description="Further fields of each openai request's body.")
    stages: dict[str, dict[str, Any]] = Field(
        {},
        description="Other values of these keys for one stage: reflect_instructions, reflect_responses, repair, judge.",
    )
    mix: tuple[dict[str, Any], ...] = Field(
        (),
        description="Several teachers, each with other values of these keys and a weight; the row's hash decides.",
    )

    @model_validator(mode="after")
    def _variants_are_valid(self) -> Self:
        from operators.teacher.variants import check_variants

        reserved = sorted(RESERVED & self.engine_kwargs.keys())
        if reserved:
            raise ValueError(f"engine_kwargs.{reserved[0]}: cannot be set here; it has a key of its own or is not safe")
        copies = sorted(name for name in self.engine_kwargs if name.startswith(_COPIES))
        if copies:
            raise ValueError(f"engine_kwargs.{copies[0]}: Ray starts and places the engines; set replicas instead")
        for name in RANKS:
            size = self.engine_kwargs.get(name, 1)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"engine_kwargs.{name}: {size!r} is not a whole number above 0")
        check_variants(self)
        return self

    def key_parts(self) -> list[str | float | int]:
        """Everything about the teacher that determines a reply; it is part of every call's key."""
        parts: list[str | float | int] = [
            self.backend,
            *_model_identity(self),
            self.temperature,
            self.top_p,
            self.seed,
            self.dtype,
        ]
        later = {name: getattr(self, name) for name in _LATER if getattr(self, name) != _default(name)}
        later |= {name: value for name, value in self.engine_kwargs.items() if name not in SPEED_ONLY}
        told = {name: value for name, value in later.items() if name in _TOLD}
        # After a new password of the endpoint, no call is made again.
        return [*parts, json.dumps(without_certain_credentials(later) | told, sort_keys=True)] if later else parts

    def identity(self) -> dict[str, Any]:
        """As for every stage, but later keys only if they are set, and without arguments that only change speed.

        Operational keys are also left out of `stages` and `mix`.
        """
        chosen = _deciding(super().identity())
        stages = {stage: _deciding(changes) for stage, changes in chosen["stages"].items()}
        chosen["stages"] = {stage: changes for stage, changes in stages.items() if changes}
        chosen["mix"] = [_deciding(changes) for changes in chosen["mix"]]
        unset = [name for name in _LATER_IDENTITY if not chosen[name] or chosen[name] == _default(name)]
        return {name: value for name, value in chosen.items() if name not in unset}


def _deciding(changes: dict[str, Any]) -> dict[str, Any]:
    """Those of `changes` that determine a reply."""
    kept = {name: value for name, value in changes.items() if name not in TeacherConfig.operational()}
    if "engine_kwargs" in kept:
        kept["engine_kwargs"] = {name: value for name, value in kept["engine_kwargs"].items() if name not in SPEED_ONLY}
    return kept


def _default(name: str) -> Any:
    return TeacherConfig.model_fields[name].default


def _model_identity(teacher: TeacherConfig) -> list[str]:
    if teacher.backend != "vllm":
        return [teacher.model]
    from operators.models import model_revision

    return [model_revision(teacher.model), str(chat_tokenizer(teacher.model).chat_template)]
