"""One model in one actor: measures the loss of every row, and answers the rows that are samples."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyarrow as pa

from operators.evaluate.config import NOT_FINITE, OVER_LONG, EvaluateConfig, TrainedAttention
from operators.model_copy import on_this_disk
from operators.progress import report_progress
from operators.student.encode import IGNORED, Encoded, EncodingError, encode_example, load_tokenizer
from operators.student.greedy_answers import greedy_answers
from operators.student.nll import load_causal_lm, sum_nll
from operators.student.pool import longest_context

MEASURED = pa.schema(
    [
        ("row_id", pa.string()),
        ("nll", pa.float64()),  # nats, summed over the row's response tokens; null if `unscored` has a reason
        ("num_tokens", pa.int64()),
        ("unscored", pa.string()),
        ("answer", pa.string()),  # null unless the row is a sample
        ("answer_tokens", pa.int32()),
    ]
)


class ModelActor:
    """Ray Data actor of `evaluate`: RAW rows in, MEASURED rows out."""

    def __init__(
        self,
        model: str,
        sample_ids: Sequence[str],
        config: EvaluateConfig,
        attention: TrainedAttention,
        chat_template: str = "",
    ) -> None:
        model = on_this_disk(model)
        self._tokenizer = load_tokenizer(model, chat_template)
        self._model = load_causal_lm(model, config)
        self._sample_ids, self._config, self._attention = frozenset(sample_ids), config, attention
        self._folder, self._limit = model, longest_context(model, config.max_tokens)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Measure a batch."""
        texts = rows.select(["row_id", "instruction", "input", "response", "turns_before", "turns_after"])
        records = [self._encode(row) for row in texts.to_pylist()]
        with attending(self._model, self._attention):
            self._score([record for record in records if record["unscored"] is None])
            self._answer([record for record in records if record["prompt"]])
        report_progress("evaluate", rows=rows.num_rows)
        return pa.Table.from_pylist(records, schema=MEASURED)

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """The dialogue with the labels that training gives it; and for a sample what comes before its response."""
        record = {"row_id": row["row_id"], "encoded": None, "prompt": None, "num_tokens": 0, "unscored": None}
        pair = (row["instruction"], row["input"], row["response"], row["turns_before"])
        try:
            encoded = encode_example(self._tokenizer, *pair, row["turns_after"], loss_on=self._config.loss_on)
            if row["row_id"] in self._sample_ids:
                record["prompt"] = prompt_of(encode_example(self._tokenizer, *pair))
        except EncodingError as error:
            return record | {"unscored": error.reason}
        unscored = OVER_LONG if len(encoded.input_ids) > self._limit else None
        return record | {"encoded": encoded, "unscored": unscored}

    def _score(self, records: list[dict[str, Any]]) -> None:
        examples = [record["encoded"] for record in records]
        for record, nll in zip(records, sum_nll(self._model, examples, self._config.batch_tokens), strict=True):
            record["num_tokens"] = sum(label != IGNORED for label in record["encoded"].labels)
            record |= {"nll": nll} if math.isfinite(nll) else {"unscored": NOT_FINITE}

    def _answer(self, records: list[dict[str, Any]]) -> None:
        room = longest_context(self._folder, self._config.max_tokens + self._config.max_new_tokens)
        fitting = [
            (record, record["prompt"])
            for record in records
            if len(record["prompt"]) + self._config.max_new_tokens <= room
        ]
        answers = greedy_answers(
            self._model,
            self._tokenizer,
            [prompt for _, prompt in fitting],
            max_new_tokens=self._config.max_new_tokens,
            repetition_penalty=self._config.repetition_penalty,
            batch_rows=self._config.generate_rows,
        )
        for (record, _), (answer, num_tokens) in zip(fitting, answers, strict=True):
            record |= {"answer": answer, "answer_tokens": num_tokens}


def attending(model: Any, attention: TrainedAttention) -> AbstractContextManager[object]:
    """A context in which the model uses the attention that it was trained with."""
    if attention.name != "hyper_attention":
        return nullcontext()
    from kernels.hyper_attention import HyperAttentionConfig
    from kernels.hyper_attention.huggingface import patched_attention

    sizes = HyperAttentionConfig(**{"mode": "causal_local", **attention.sizes})
    return patched_attention(model, sizes, attention.layers)


def prompt_of(encoded: Encoded) -> list[int]:
    """The tokens before the response."""
    return encoded.input_ids[: next(place for place, label in enumerate(encoded.labels) if label != IGNORED)]
