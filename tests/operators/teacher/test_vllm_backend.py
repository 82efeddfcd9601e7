"""How a vLLM engine is started, how a call is sampled, and how thoughts are removed from a reply."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from operators.teacher import vllm_backend
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import CUT_TEXTLESS, TEXTLESS
from operators.teacher.vllm_backend import (
    VllmEngine,
    _Thoughts,
    _thoughts_of,
    engine_arguments,
    engine_needs,
    sampling_of,
)

TEACHER = TeacherConfig(model="some/model")
CALL = {"call_key": "f" * 64, "row_id": "a", "messages": "[]", "schema": '{"type": "object"}', "max_tokens": 9}


def test_on_gpus_the_engine_chooses_how_many_sequences_it_decodes() -> None:
    assert not {"max_num_seqs", "max_num_batched_tokens", "enforce_eager"} & engine_arguments(TEACHER).keys()
    chosen = TEACHER.model_copy(update={"max_num_seqs": 8, "engine_kwargs": {"max_num_batched_tokens": 512}})
    assert engine_arguments(chosen)["max_num_seqs"] == 8
    assert engine_arguments(chosen)["max_num_batched_tokens"] == 512


def test_a_configuration_cannot_change_safety_settings() -> None:
    careless = TEACHER.model_copy(update={"engine_kwargs": {"trust_remote_code": True, "load_format": "pt"}})
    arguments = engine_arguments(careless)
    assert (arguments["trust_remote_code"], arguments["load_format"]) == (False, "safetensors")


@pytest.mark.parametrize(
    ("changes", "backend", "needs"),
    [
        ({}, "uni", {"CPU": 1, "GPU": 1}),
        ({"tensor_parallel": 4}, "ray", {"CPU": 4, "GPU": 4}),
        ({"tensor_parallel": 2, "engine_kwargs": {"pipeline_parallel_size": 2}}, "ray", {"CPU": 4, "GPU": 4}),
        ({"engine_kwargs": {"prefill_context_parallel_size": 2}}, "ray", {"CPU": 2, "GPU": 2}),
        ({"device": "cpu", "cpus_per_replica": 2}, "uni", {"CPU": 2}),
    ],
)
def test_ranks_decide_what_an_engine_needs(changes: dict[str, object], backend: str, needs: dict[str, float]) -> None:
    teacher = TEACHER.model_copy(update=changes)
    assert engine_arguments(teacher)["distributed_executor_backend"] == backend
    assert engine_needs(teacher) == needs


THINK, END = 1, 2  # ids of the tokens around thoughts


class Parser:
    """As vLLM's parser of DeepSeek-R1: a reply without the end of thoughts is all thoughts."""

    def is_reasoning_end(self, ids: list[int]) -> bool:
        return END in ids

    def extract_reasoning(self, text: str, _request: Any) -> tuple[str, str | None]:
        reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
        return reasoning, answer or None


def answered_by_an_engine(
    monkeypatch: pytest.MonkeyPatch, text: str, reason: str, *, parser: bool, prompt: tuple[int, ...] = (THINK,)
) -> Any:
    """What an engine makes of this output, without vLLM."""
    thoughts = _Thoughts.__new__(_Thoughts)
    thoughts._parser, thoughts._special, thoughts._model = Parser(), ["<think>", "</think>"], "m"
    monkeypatch.setattr(vllm_backend, "_thoughts_of", lambda *_: thoughts if parser else None)
    monkeypatch.setattr(vllm_backend, "prompt_token_ids", lambda *_: [*prompt])
    monkeypatch.setattr(vllm_backend, "sampling_of", lambda *_: None)
    ids = [END, 9] if "</think>" in text else [9, 9]
    output = SimpleNamespace(text=text, finish_reason=reason, token_ids=ids)
    engine = VllmEngine.__new__(VllmEngine)
    engine._generate = lambda *_: asyncio.sleep(0, output)  # type: ignore[method-assign]
    return asyncio.run(engine._answer(CALL, TEACHER))


@pytest.mark.parametrize("parser", [True, False])
@pytest.mark.parametrize("text", ["<think>A draft. No, wait", "<think>A draft.</think>\n"])
def test_thoughts_that_the_limit_cut_off_are_no_reply(monkeypatch: pytest.MonkeyPatch, text: str, parser: bool) -> None:
    reply = answered_by_an_engine(monkeypatch, text, "length", parser=parser)
    assert (reply["reply"], reply["error"], reply["generated_tokens"]) == (None, CUT_TEXTLESS, 2)


@pytest.mark.parametrize(
    ("text", "reason", "prompt", "said"),
    [
        ("A draft. No, wait", "length", (THINK,), None),
        ("A draft.</think>", "stop", (THINK,), None),  # it thought, and then said nothing
        ("Let me see.</think>Blue.", "length", (THINK,), "Blue."),
        ("Blue.", "stop", (THINK,), "Blue."),
        ("Blue and", "length", (THINK, END), "Blue and"),  # the prompt has ended the thoughts
    ],
)
def test_what_the_parser_takes_for_thoughts_is_a_reply_only_if_it_can_be_one(
    monkeypatch: pytest.MonkeyPatch, text: str, reason: str, prompt: tuple[int, ...], said: str | None
) -> None:
    reply = answered_by_an_engine(monkeypatch, text, reason, parser=True, prompt=prompt)
    assert reply["reply"] == said
    assert reply["error"] == ("" if said else f"{TEXTLESS}{reason}")


@pytest.mark.slow
def test_a_call_is_sampled_as_its_stage_says() -> None:
    teacher = TEACHER.model_copy(
        update={"temperature": 0.5, "top_k": 20, "min_p": 0.1, "stop": ("END",), "reasoning_parser": "qwen3"}
    )
    sampling = sampling_of(CALL, teacher)
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.stop) == (0.5, 20, 0.1, ["END"])
    assert (sampling.max_tokens, sampling.skip_special_tokens) == (9, False)
    assert sampling.structured_outputs.json == CALL["schema"]
    assert sampling.seed is not None
    assert sampling_of(CALL, teacher.model_copy(update={"device": "cpu"})).seed is None


@pytest.mark.slow
def test_thoughts_are_not_part_of_a_reply(demo_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path)
    thoughts = _thoughts_of("deepseek_r1", str(tmp_path), "{}")
    assert thoughts is not None
    assert thoughts.taken_off("Let me see.</think>\n\nThe answer.<|im_end|>", CALL, may_be_all=False) == "The answer."
    assert thoughts.taken_off("<think>cut off in the middle", CALL, may_be_all=True) == "cut off in the middle"
    assert thoughts.taken_off("<think>cut off in the middle", CALL, may_be_all=False) == ""
    prompt = tokenizer("<think>\n\n</think>\n\n")["input_ids"]
    assert thoughts.ended(prompt)
    assert not thoughts.ended(tokenizer("Hello")["input_ids"])
