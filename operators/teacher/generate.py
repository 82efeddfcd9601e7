"""The teacher: turns calls (chat messages) into raw replies, with vLLM engines, an endpoint, or a script."""

from functools import partial
from typing import Any

import ray
from ray.data import Dataset

from operators.teacher.caller import Caller
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import EngineSpec, pool_of
from operators.teacher.journal import Store
from operators.teacher.scripted_backend import MORTAL, mortal_spec, scripted_batch
from operators.teacher.vllm_backend import vllm_spec

CALLER_CPUS = 0  # a caller mostly waits; the last CPU that an engine leaves free is for the tasks that prepare calls
# A killed task of the scripted teacher is retried as long as the stage runs.
SCRIPTED_TASK: dict[str, Any] = {"num_cpus": 0.25, "max_retries": -1}


def generate(calls: Dataset, teacher: TeacherConfig, store: Store | None = None) -> Dataset:
    """Answer every call once; a failed call becomes a row with `error`, never an exception.

    A dead engine is replaced; the supervisor of the store limits how often.

    Args:
        calls: see below; a block is a batch.
        teacher: who answers; its `stages` and `mix` are ignored.
        store: stores replies on disk as they come; None stores nothing and puts the replies into the result.

    Columns in:
        call_key, row_id: str; messages: JSON list of {"role", "content"}; schema: JSON schema of the reply or "";
        max_tokens: int32, of the reply.
    Columns out:
        REPLIES. `reply` is null if `error` is not empty, and in all rows if there is a `store`. `finish_reason` is
        "stop" or "length".
    """
    if teacher.backend == "scripted" and teacher.model != MORTAL:
        answer = partial(scripted_batch, model=teacher.model, store=store)
        return calls.map_batches(answer, batch_size=None, batch_format="pyarrow", **SCRIPTED_TASK)
    spec = engine_spec(teacher)
    fewest, most = (teacher.replicas,) * 2 if isinstance(teacher.replicas, int) else teacher.replicas
    return calls.map_batches(
        Caller,
        fn_constructor_kwargs={"teacher": teacher, "pool": spec and pool_of(spec), "store": store},
        compute=ray.data.ActorPoolStrategy(
            min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=2 * teacher.concurrent_batches
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=CALLER_CPUS,
        max_concurrency=teacher.concurrent_batches,
    )


def engine_spec(teacher: TeacherConfig) -> EngineSpec | None:
    """The kind of engine that this teacher's calls need; None if it is an endpoint or the plain script."""
    if teacher.backend == "vllm":
        return vllm_spec(teacher)
    return mortal_spec(teacher) if teacher.model == MORTAL and teacher.backend == "scripted" else None
