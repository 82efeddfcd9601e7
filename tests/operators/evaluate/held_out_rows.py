"""Held-out rows for the tests that compare two models, and the actor that measures them without its pool."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from operators.columns import HELD_OUT, RAW
from operators.evaluate.config import EvaluateConfig, TrainedAttention
from operators.evaluate.model_actor import ModelActor

Text = tuple[str, str, str | None, str]  # row id, instruction, input, response


def held_out(texts: list[Text], blocks: int = 1) -> Any:
    rows = [dict(zip(RAW.names, (*text, "", "", "", "", "here", False, HELD_OUT), strict=True)) for text in texts]
    return ray.data.from_arrow([pa.Table.from_pylist(rows[start::blocks], schema=RAW) for start in range(blocks)])


def measure_here(
    rows: Any,
    model: str,
    sample_ids: Sequence[str],
    config: EvaluateConfig,
    attention: TrainedAttention,
    chat_template: str = "",
) -> pa.Table:
    """Replaces `evaluate._measure`: runs the same actor in this process, which has imported torch already."""
    actor = ModelActor(model, sample_ids, config, attention, chat_template)
    return actor(pa.concat_tables(ray.get(rows.to_arrow_refs())))
