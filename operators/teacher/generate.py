"""The teacher: turns calls (chat messages) into raw replies by vLLM actors, an OpenAI-compatible endpoint, or a script.

The three backends are interchangeable: each is a function `calls -> replies` on Ray Data.
"""

from collections.abc import Callable
from typing import Any

from ray.data import Dataset

from operators.teacher.config import TeacherConfig
from operators.teacher.openai_backend import generate_openai
from operators.teacher.scripted_backend import generate_scripted
from operators.teacher.vllm_backend import generate_vllm


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
        "vllm": generate_vllm,
        "openai": generate_openai,
        "scripted": generate_scripted,
    }
    return backends[teacher.backend](calls, teacher, supervisor)
