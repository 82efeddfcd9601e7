"""A teacher in vLLM engines on the cluster: one actor per engine, shared by the stages of a run (`engine_pool`).

This module tokenises prompts with the teacher's own chat template and gives vLLM token ids: if a prompt is rendered to
text and tokenised again, several model families add a second beginning-of-sequence token.
"""

import asyncio
import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import ray

from operators.teacher.calls import Call, Reply, answered, call_seed, failed, is_broken, is_cut, is_cut_in_thoughts
from operators.teacher.config import RANKS, TeacherConfig
from operators.teacher.engine_pool import EngineSpec
from operators.teacher.failures import BROKEN_OFF, over_long, textless
from operators.teacher.prompt_tokens import chat_tokenizer, prompt_token_ids

MOST_CALLS = 4096  # in one engine actor at once
PROBE_TOKENS = 8  # first tokens of a prompt: the beginning of the chat template, before any text of a row
PROBE = json.dumps([{"role": "user", "content": "Hello"}])


class VllmEngine:
    """The actor's body: an engine that turns calls into replies."""

    def __init__(self, teacher: TeacherConfig) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._teacher = teacher
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(teacher)))

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the engine has given a token: an engine that has loaded may still hang at its first call.

        Raises:
            TimeoutError: it gave no token in time.
        """
        from vllm import SamplingParams

        ids = prompt_token_ids(PROBE, self._teacher)[:PROBE_TOKENS]
        try:
            async with asyncio.timeout(timeout_s):
                await self._generate(ids, SamplingParams(max_tokens=1, temperature=0), "probe", {})
        except TimeoutError:
            raise TimeoutError(
                f"it has loaded but gave no token within teacher.first_token_timeout_s: {timeout_s:g} s"
            ) from None

    async def answer(self, call: Call, teacher: TeacherConfig) -> Reply:
        """Make one call; an error of the call is a failed reply. If the engine is dead, this ends the actor's process.

        Args:
            call: one row of CALLS.
            teacher: of the stage that asks; only its sampling may differ from the engine's teacher.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._answer(call, teacher)
        except EngineDeadError:
            os._exit(1)  # the caller sees the death of this actor, and the pool starts another
        except Exception as error:  # noqa: BLE001 - no call may end the run
            return failed(call, f"{type(error).__name__}: {error}")

    async def stop(self) -> None:
        """End the processes of the engine; if the actor were only killed, they would stay."""
        self._llm.shutdown()

    async def _answer(self, call: Call, teacher: TeacherConfig) -> Reply:
        ids = prompt_token_ids(call["messages"], teacher)
        if len(ids) >= teacher.max_model_len:
            return failed(call, over_long(len(ids), teacher.max_model_len))
        thoughts = _thoughts_of(teacher.reasoning_parser, teacher.model, json.dumps(teacher.chat_template_kwargs))
        ended = {} if thoughts is None else {"reasoning_ended": thoughts.ended(ids)}
        sampling = sampling_of(call, teacher)
        output = await self._generate(ids, sampling, call["call_key"], ended)
        reason, text, counts = str(output.finish_reason), output.text, (len(ids), len(output.token_ids))
        if is_broken(reason):
            return failed(call, f"{BROKEN_OFF}{reason}", *counts)
        if thoughts is not None:
            cut_in_thoughts = is_cut(reason) and not ended["reasoning_ended"]
            silent = cut_in_thoughts or thoughts.ended([*output.token_ids])
            text = thoughts.taken_off(text, call, may_be_all=not silent)
        if not text or is_cut_in_thoughts(text, reason):
            return failed(call, textless(reason), *counts)
        return answered(call, text, reason, *counts)

    async def _generate(self, ids: list[int], sampling: Any, name: str, ended: dict[str, Any]) -> Any:
        last = None
        # A call may come again while its first request is still being aborted, so ids of requests must differ.
        request = f"{name}-{os.urandom(4).hex()}"
        async for output in self._llm.generate({"prompt_token_ids": ids}, sampling, request, **ended):
            last = output
        if last is None:
            raise ValueError("the engine ended a reply before it began")
        return last.outputs[0]


def sampling_of(call: Call, teacher: TeacherConfig) -> Any:
    """The SamplingParams of one call, as vLLM knows them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        temperature=teacher.temperature,
        top_p=teacher.top_p,
        top_k=teacher.top_k,
        min_p=teacher.min_p,
        stop=list(teacher.stop),
        max_tokens=int(call["max_tokens"]),
        # vLLM's CPU engine crashes on per-request seeds, because its generator keeps no offset.
        seed=call_seed(call["call_key"]) if teacher.device == "gpu" else None,
        # Special tokens separate thoughts from the answer, so they must stay in the text.
        skip_special_tokens=not teacher.reasoning_parser,
        structured_outputs=StructuredOutputsParams(json=call["schema"]) if call["schema"] else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@lru_cache(maxsize=16)
def _thoughts_of(parser: str, model: str, template_kwargs: str) -> "_Thoughts | None":
    return _Thoughts(parser, model, json.loads(template_kwargs)) if parser else None


class _Thoughts:
    """vLLM's reasoning parser for one model; it removes the thoughts before the answer."""

    def __init__(self, parser: str, model: str, template_kwargs: dict[str, Any]) -> None:
        from vllm.reasoning import ReasoningParserManager

        tokenizer = chat_tokenizer(model)
        kind = ReasoningParserManager.get_reasoning_parser(parser)
        self._parser = kind(tokenizer, chat_template_kwargs=template_kwargs)
        self._special = [token for token in tokenizer.all_special_tokens if token]
        self._model = model

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether these tokens end the thoughts; a prompt does with `enable_thinking: false`."""
        return bool(self._parser.is_reasoning_end(ids))

    def taken_off(self, text: str, call: Call, *, may_be_all: bool) -> str:
        """The answer without thoughts.

        Args:
            text: of the reply.
            call: that it answers.
            may_be_all: whether a text that is all thoughts for the parser is the answer: some parsers take a reply
                without thoughts for thoughts. Otherwise it gives "".
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model=self._model, messages=json.loads(call["messages"]))
        _, answer = self._parser.extract_reasoning(text, request)
        answer = (text if may_be_all else "") if answer is None else answer
        for token in self._special:
            answer = answer.replace(token, "")
        return answer.strip()


def engine_arguments(teacher: TeacherConfig) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs; a configuration cannot change those that matter for safety."""
    arguments: dict[str, Any] = {
        "enable_prefix_caching": True,  # all rows of a stage share the beginning of their prompt
        "structured_outputs_config": {
            # Compact JSON only: if white space is allowed, a small model may print blanks to the end (vllm#8350).
            "disable_any_whitespace": True,
            "backend": "xgrammar",
        },
        "disable_log_stats": True,
        "distributed_executor_backend": "uni" if ranks(teacher) == 1 else "ray",
        **({"enforce_eager": True} if teacher.device == "cpu" else {}),
        **({"max_num_seqs": teacher.max_num_seqs} if teacher.max_num_seqs else {}),
        **teacher.engine_kwargs,
        "model": teacher.model,
        "dtype": teacher.dtype,
        "max_model_len": teacher.max_model_len,
        "seed": teacher.seed,
        "tensor_parallel_size": teacher.tensor_parallel,
        "load_format": "safetensors",
        "trust_remote_code": False,
    }
    return arguments | ({"reasoning_parser": teacher.reasoning_parser} if teacher.reasoning_parser else {})


def ranks(teacher: TeacherConfig) -> int:
    """Number of processes of one engine, each with its own GPU."""
    return math.prod([teacher.tensor_parallel, *(int(teacher.engine_kwargs.get(name, 1)) for name in RANKS)])


def engine_needs(teacher: TeacherConfig) -> dict[str, float]:
    """Logical resources of one engine."""
    count = 1 if teacher.device == "cpu" else ranks(teacher)
    custom = {name: amount * count for name, amount in teacher.custom_resources.items()}
    if teacher.device == "cpu":
        return {"CPU": teacher.cpus_per_replica, **custom}
    return {"CPU": float(count), "GPU": float(count), **custom}


def most_gpus() -> float:
    """The number of GPUs of the node that has the most."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return max((float(node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]), default=0.0)


def vllm_spec(teacher: TeacherConfig) -> EngineSpec:
    """The pool of engines that this teacher's calls need; stages whose sampling differs share it."""
    most = teacher.replicas if isinstance(teacher.replicas, int) else teacher.replicas[1]
    place = {"device": teacher.device, "custom_resources": teacher.custom_resources}
    identity = engine_arguments(teacher) | place | {"most": most, "threads": teacher.cpu_threads}
    return EngineSpec(partial(_make_engine, teacher), identity, engine_needs(teacher), most)


def _make_engine(teacher: TeacherConfig) -> tuple[Any, Any]:
    options: dict[str, Any] = {"max_concurrency": MOST_CALLS, "num_cpus": teacher.cpus_per_replica}
    options["resources"] = teacher.custom_resources
    group = None
    if teacher.device == "cpu":
        options["runtime_env"] = {"env_vars": _cpu_environment(teacher)}
    elif ranks(teacher) == 1:
        options |= {"num_cpus": 1, "num_gpus": 1}
    else:  # vLLM's executor places its ranks in the placement group of its actor
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": 1, "GPU": 1, **teacher.custom_resources}
        # All ranks on one node where a node is large enough: between nodes each layer would wait for the network.
        strategy = "STRICT_PACK" if most_gpus() >= ranks(teacher) else "PACK"
        group = ray.util.placement_group([bundle] * ranks(teacher), strategy=strategy)
        placed = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        options |= {"num_cpus": 0, "num_gpus": 0, "resources": {}, "scheduling_strategy": placed}
    actor: Any = ray.remote(VllmEngine)
    return actor.options(**options).remote(teacher), group


def _cpu_environment(teacher: TeacherConfig) -> dict[str, str]:
    """Environment of an engine on CPUs.

    The model runs in the engine core's own process: vLLM would start another process only to set the number of threads,
    which this environment sets.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(teacher.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(teacher.cpu_threads),
    }
