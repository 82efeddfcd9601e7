"""Which teacher answers, how it samples, and what it may use of the cluster."""

from typing import Literal

from pydantic import Field

from operators.stage import Operational, StageConfig
from operators.teacher.prompt_tokens import chat_tokenizer, prompt_token_ids


class TeacherConfig(StageConfig):
    """Which model answers, how it samples, and what it may use of the cluster."""

    backend: Literal["vllm", "openai", "scripted"] = Field("vllm", description="vllm actors, an endpoint, or the fake")
    model: str = Field(description="folder, hub id or package:<wheel>; for openai the name the endpoint knows")
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature; 0 decodes greedily.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass of the tokens that are sampled from.")
    seed: int = Field(0, ge=0, description="on GPUs and endpoints it is part of every call's own seed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights and activations of vllm; auto takes the model's own."
    )
    max_model_len: int = Field(4096, ge=256, description="prompt and reply together, tokens")
    replicas: Operational[int | tuple[int, int]] = Field(1, description="engines, or (min, max) for an autoscaled pool")
    device: Operational[Literal["gpu", "cpu"]] = Field(
        "gpu", description="gpu: one for each tensor_parallel rank of a replica"
    )
    cpus_per_replica: Operational[float] = Field(1, gt=0, description="CPUs an engine without GPUs reserves")
    tensor_parallel: Operational[int] = Field(1, ge=1, description="GPUs that share one copy of the weights")
    batch_rows: Operational[int] = Field(
        64, ge=1, description="rows handed over, and committed to the ledger, at a time"
    )
    concurrent_batches: Operational[int] = Field(8, ge=1, description="batches in flight in one engine")
    max_num_seqs: Operational[int] = Field(256, ge=1, description="sequences an engine decodes at once")
    cpu_kv_cache_gib: Operational[int] = Field(
        1, ge=1, description="Memory of the key-value cache of an engine on CPUs, in GiB."
    )
    cpu_threads: Operational[int] = Field(1, ge=1, description="threads of an engine on CPUs")
    max_attempts: Operational[int] = Field(3, ge=1, description="calls that failed this often are not made again")
    max_failed_share: Operational[float] = Field(
        0.5, ge=0, le=1, description="of a stage's calls; with more failures it stops"
    )
    no_progress_timeout_s: Operational[float] = Field(
        1800, gt=0, description="a stage without a reply for so long stops; the start of the engine counts"
    )
    first_token_timeout_s: Operational[float] = Field(
        300, gt=0, description="vllm: for the first token of an engine that has started"
    )
    base_url: Operational[str] = Field(
        "", description="openai: address of the endpoint, such as http://127.0.0.1:8000/v1"
    )
    api_key_env: Operational[str] = Field("OPENAI_API_KEY", description="openai: variable that holds the key")
    concurrent_requests: Operational[int] = Field(
        16, ge=1, description="openai: most requests in flight, fewer if it complains"
    )
    requests_per_minute: Operational[float] = Field(0, ge=0, description="openai: of each replica; 0 means no limit")
    request_timeout_s: Operational[float] = Field(600, gt=0, description="openai: of one attempt")
    max_retries: Operational[int] = Field(
        6, ge=0, description="openai: of one call, after 429, 5xx and lost connections"
    )

    def key_parts(self) -> list[str | float | int]:
        """Everything about the teacher that determines a reply; part of every call's key."""
        return [self.backend, *_model_identity(self), self.temperature, self.top_p, self.seed, self.dtype]


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
