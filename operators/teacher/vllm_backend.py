"""A teacher in vLLM engines on the cluster: one actor an engine, which the stages of a run share (`engine_pool`).

Prompts are tokenised here with the teacher's own chat template and handed to vLLM as token ids, because a prompt that
is rendered to text and tokenised again gets a second beginning-of-sequence token from several model families.
"""

import asyncio
import json
import os
from functools import lru_cache, partial
from typing import Any

import ray

from operators.teacher.calls import Call, Reply, answered, call_seed, failed, is_broken
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import EngineSpec
from operators.teacher.failures import BROKEN_OFF, TEXTLESS, over_long
from operators.teacher.prompt_tokens import chat_tokenizer, prompt_token_ids

MOST_CALLS = 4096  # in one engine actor at once
PROBE_TOKENS = 8  # of a prompt: the head of the chat template, in which no row has a part
PROBE = json.dumps([{"role": "user", "content": "Hello"}])


class VllmEngine:
    """The actor's body: an engine, and the way from a call to a reply."""

    def __init__(self, teacher: TeacherConfig) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._teacher = teacher
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(teacher)))

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the engine has given a token: one that has loaded may still hang at its first call.

        Raises:
            TimeoutError: it gave none in time.
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
        """One call; an error of the call is a failed reply. An engine that is dead takes its actor with it.

        Args:
            call: one of CALLS.
            teacher: of the stage that asks; only its sampling may differ from that of the engine.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._answer(call, teacher)
        except EngineDeadError:
            os._exit(1)  # the caller learns it as the death of this actor, and the pool starts another
        except Exception as error:  # noqa: BLE001 - no call may end the run
            return failed(call, f"{type(error).__name__}: {error}")

    async def stop(self) -> None:
        """End the processes of the engine; those of a killed actor would live on."""
        self._llm.shutdown()

    async def _answer(self, call: Call, teacher: TeacherConfig) -> Reply:
        ids = prompt_token_ids(call["messages"], teacher)
        if len(ids) >= teacher.max_model_len:
            return failed(call, over_long(len(ids), teacher.max_model_len))
        thoughts = _thoughts_of(teacher.reasoning_parser, teacher.model, json.dumps(teacher.chat_template_kwargs))
        ended = {} if thoughts is None else {"reasoning_ended": thoughts.ended(ids)}
        sampling = sampling_of(call, teacher)
        output = await self._generate(ids, sampling, call["call_key"], ended)
        if is_broken(str(output.finish_reason)):
            return failed(call, f"{BROKEN_OFF}{output.finish_reason}", len(ids), len(output.token_ids))
        text = output.text if thoughts is None else thoughts.taken_off(output.text, call)
        if not text:
            words = f"{TEXTLESS}{output.finish_reason}"
            return failed(call, words, len(ids), len(output.token_ids))
        return answered(call, text, str(output.finish_reason), len(ids), len(output.token_ids))

    async def _generate(self, ids: list[int], sampling: Any, name: str, ended: dict[str, Any]) -> Any:
        last = None
        # A call may come a second time while its first turn is being given up: ids of requests must differ.
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
        # The CPU engine crashes on per-request seeds: its generator keeps no offset.
        seed=call_seed(call["call_key"]) if teacher.device == "gpu" else None,
        # Thoughts are told from the answer by tokens that would otherwise be left out of the text.
        skip_special_tokens=not teacher.reasoning_parser,
        structured_outputs=StructuredOutputsParams(json=call["schema"]) if call["schema"] else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@lru_cache(maxsize=16)
def _thoughts_of(parser: str, model: str, template_kwargs: str) -> "_Thoughts | None":
    return _Thoughts(parser, model, json.loads(template_kwargs)) if parser else None


class _Thoughts:
    """vLLM's reasoning parser for one model: what it thinks first is no part of its reply."""

    def __init__(self, parser: str, model: str, template_kwargs: dict[str, Any]) -> None:
        from vllm.reasoning import ReasoningParserManager

        tokenizer = chat_tokenizer(model)
        kind = ReasoningParserManager.get_reasoning_parser(parser)
        self._parser = kind(tokenizer, chat_template_kwargs=template_kwargs)
        self._special = [token for token in tokenizer.all_special_tokens if token]
        self._model = model

    def ended(self, prompt: list[int]) -> bool:
        """Whether the prompt has closed the thoughts, as templates do for `enable_thinking: false`."""
        return bool(self._parser.is_reasoning_end(prompt))

    def taken_off(self, text: str, call: Call) -> str:
        """The answer without thoughts; all of the text if it was nothing but thoughts, as a cut-off reply is."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model=self._model, messages=json.loads(call["messages"]))
        _, answer = self._parser.extract_reasoning(text, request)
        answer = text if answer is None else answer
        for token in self._special:
            answer = answer.replace(token, "")
        return answer.strip()


def engine_arguments(teacher: TeacherConfig) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs; what is safe is not left to a configuration."""
    arguments: dict[str, Any] = {
        "enable_prefix_caching": True,  # all rows of a stage share the head of their prompt
        "structured_outputs_config": {
            # Compact JSON only: with free white space a small model can print blanks until max_tokens (vllm#8350).
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
    """How many processes, each with a GPU of its own, one engine has."""
    return teacher.tensor_parallel * int(teacher.engine_kwargs.get("pipeline_parallel_size", 1))


def engine_needs(teacher: TeacherConfig) -> dict[str, float]:
    """Logical resources of one engine."""
    if teacher.device == "cpu":
        return {"CPU": teacher.cpus_per_replica}
    return {"CPU": float(ranks(teacher)), "GPU": float(ranks(teacher))}


def vllm_spec(teacher: TeacherConfig) -> EngineSpec:
    """The pool of engines that this teacher's calls need; stages whose sampling differs share it."""
    most = teacher.replicas if isinstance(teacher.replicas, int) else teacher.replicas[1]
    identity = engine_arguments(teacher) | {"device": teacher.device, "most": most, "threads": teacher.cpu_threads}
    return EngineSpec(partial(_make_engine, teacher), identity, engine_needs(teacher), most)


def _make_engine(teacher: TeacherConfig) -> tuple[Any, Any]:
    options: dict[str, Any] = {"max_concurrency": MOST_CALLS, "num_cpus": teacher.cpus_per_replica}
    group = None
    if teacher.device == "cpu":
        options["runtime_env"] = {"env_vars": _cpu_environment(teacher)}
    elif ranks(teacher) == 1:
        options |= {"num_cpus": 1, "num_gpus": 1}
    else:  # vLLM's executor places its ranks in the group that its actor is in
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([{"CPU": 1, "GPU": 1}] * ranks(teacher), strategy="PACK")
        placed = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": placed}
    actor: Any = ray.remote(VllmEngine)
    return actor.options(**options).remote(teacher), group


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
