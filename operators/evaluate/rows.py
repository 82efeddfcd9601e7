"""The measurements of every held-out row, and comparisons of two models row by row.

The measurements of all rows come to the driver: about 100 bytes per row and model, and the sample answers.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from operators.evaluate.config import NOT_FINITE, EvaluateConfig
from operators.evaluate.results import NUM_QUANTILES, HeldOutLoss, PairedChange
from operators.files.atomic import open_filesystem, put_file

# Columns for every held-out row: nats summed over its response tokens, and the answers if it is a sample.
ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("num_tokens", pa.int64()),
        ("base_nll", pa.float64()),
        ("student_nll", pa.float64()),
        ("base_unscored", pa.string()),
        ("student_unscored", pa.string()),
        ("base_answer", pa.string()),
        ("student_answer", pa.string()),
        ("base_answer_tokens", pa.int32()),
        ("student_answer_tokens", pa.int32()),
    ]
)
_MEASURED_WITH = b"measured_with"  # in the metadata of the file: keys of the configuration, as JSON
# The column of an earlier student and the keys that decide about its content.
_DECIDED_BY = {
    "student_nll": ("loss_on", "precision"),
    "student_answer": ("max_new_tokens", "repetition_penalty"),
}
NUM_RESAMPLES = 1000
RESAMPLED_AT_ONCE = 2_000_000  # numbers; bounds the bootstrap's memory to about 50 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What a model answered to a sample, and the length of the answer in its tokens."""

    text: str
    num_tokens: int


def join_measurements(base: pa.Table, student: pa.Table) -> pa.Table:
    """The measurements of both models side by side, sorted by row id.

    Args:
        base: `model_actor.MEASURED` of the base model.
        student: the same of the student, for the same rows.

    Columns out:
        `ROWS`.

    Raises:
        ValueError: the two models count different numbers of response tokens in a row that both scored.
    """
    base, student = base.sort_by("row_id"), student.sort_by("row_id")
    both = pc.and_(pc.is_valid(base["nll"]), pc.is_valid(student["nll"]))
    different = pc.and_(both, pc.not_equal(base["num_tokens"], student["num_tokens"]))
    if pc.any(different).as_py():
        row = pc.index(different, pa.scalar(True)).as_py()
        raise ValueError(
            f"evaluate: the student reads {student['num_tokens'][row]} response tokens in held-out row "
            f"{base['row_id'][row]}, its base model {base['num_tokens'][row]}; "
            "they must share tokenizer and chat template"
        )
    columns = {"row_id": base["row_id"], "num_tokens": student["num_tokens"]}
    for name in ("nll", "unscored", "answer", "answer_tokens"):
        columns |= {f"base_{name}": base[name], f"student_{name}": student[name]}
    return pa.table({field.name: columns[field.name] for field in ROWS}).cast(ROWS)


def compare_losses(rows: pa.Table) -> HeldOutLoss:
    """Mean losses of both models, the reasons of rows without one, and the change with its uncertainty."""
    scored = rows.filter(pc.and_(pc.is_valid(rows["base_nll"]), pc.is_valid(rows["student_nll"])))
    unscored: Counter[str] = Counter()
    for model in ("base", "student"):
        unscored |= Counter(rows[f"{model}_unscored"].drop_null().to_pylist())
    return HeldOutLoss(
        base=_mean_loss(rows, "base"),
        student=_mean_loss(rows, "student"),
        num_tokens=pc.sum(scored["num_tokens"]).as_py() or 0,
        num_rows=scored.num_rows,
        unscored=dict(unscored),
        change=paired_change(scored["base_nll"], scored["student_nll"], scored["num_tokens"]),
    )


def change_on_common_rows(rows: pa.Table, earlier: pa.Table) -> PairedChange:
    """The student's loss less an earlier student's, on the rows that both scored.

    The nats of both are divided by the new student's number of tokens, so that students with different tokenizers can
    be compared.

    Args:
        rows: `ROWS` of the new student.
        earlier: `ROWS` of the earlier one.
    """
    wanted = earlier.select(["row_id", "student_nll"]).rename_columns(["row_id", "earlier_nll"])
    common = rows.select(["row_id", "student_nll", "num_tokens"]).join(wanted, "row_id", join_type="inner")
    valid = common.filter(pc.and_(pc.is_valid(common["student_nll"]), pc.is_valid(common["earlier_nll"])))
    valid = valid.sort_by("row_id")  # a join keeps no order, and the resampling depends on it
    return paired_change(valid["earlier_nll"], valid["student_nll"], valid["num_tokens"])


def paired_change(before: pa.ChunkedArray, after: pa.ChunkedArray, num_tokens: pa.ChunkedArray) -> PairedChange:
    """Nats per token by which `after` lies above `before`, with a percentile bootstrap over the rows (seeded).

    Args:
        before: nats of each row, none null.
        after: nats of the same rows under the other model.
        num_tokens: response tokens of the same rows.
    """
    old, new, tokens = (np.asarray(values.to_numpy(), np.float64) for values in (before, after, num_tokens))
    if not len(tokens):
        return PairedChange()
    estimate = float(_change(old, new, tokens))
    if len(tokens) == 1:
        return PairedChange(num_rows=1, estimate=estimate)
    from scipy import stats  # here, because it takes half a second and most processes do not need it

    found = stats.bootstrap(
        (old, new, tokens),
        _change,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, RESAMPLED_AT_ONCE // len(tokens)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    shares = np.arange(1, NUM_QUANTILES + 1) / (NUM_QUANTILES + 1)
    quantiles = np.quantile(found.bootstrap_distribution, shares)
    return PairedChange(num_rows=len(tokens), estimate=estimate, quantiles=tuple(map(float, quantiles)))


def answers_of(rows: pa.Table, model: str) -> Mapping[str, Answer]:
    """Row id -> answer of "base" or "student", for the samples that it answered."""
    answered = rows.filter(pc.is_valid(rows[f"{model}_answer"]))
    columns = (answered[name].to_pylist() for name in ("row_id", f"{model}_answer", f"{model}_answer_tokens"))
    return {row_id: Answer(text, tokens) for row_id, text, tokens in zip(*columns, strict=True)}


def write_rows(rows: pa.Table, path: str, config: EvaluateConfig | None = None) -> None:
    """Write `ROWS` to a path or URI; the file has its name only when it is whole.

    Args:
        rows: the measurements.
        path: of the file.
        config: with which they were made; it is written into the metadata of the file.
    """
    if config is not None:
        rows = rows.replace_schema_metadata({_MEASURED_WITH: json.dumps(_keys_of(config))})
    put_file(path, partial(pq.write_table, rows, compression="zstd", write_page_checksum=True))


def read_rows(path: str) -> pa.Table | None:
    """`ROWS` of an earlier evaluation, with the metadata of the file; None if the file no longer exists."""
    filesystem, inside = open_filesystem(path)
    if filesystem.get_file_info(inside).type == fs.FileType.NotFound:
        return None
    read = pq.read_table(inside, filesystem=filesystem, partitioning=None, page_checksum_verification=True)
    return read.cast(ROWS).replace_schema_metadata(read.schema.metadata)


def comparable(earlier: pa.Table, config: EvaluateConfig) -> tuple[pa.Table, str]:
    """The measurements of an earlier student without those that the keys of an evaluation have made differently.

    Other tokens or another number format give another loss, and longer answers are judged better. A row that has a loss
    has the same under every `max_tokens`. Files of earlier releases do not say with which keys they were made; they
    count as made with the same, so that a storage keeps what it has measured.

    Args:
        earlier: from `read_rows`.
        config: with which a new student is measured.

    Returns:
        `ROWS`, with null instead of the student's losses or answers, and the keys that differ, "" if none.
    """
    wanted = _keys_of(config)
    told = json.loads((earlier.schema.metadata or {}).get(_MEASURED_WITH, "{}"))
    differing = [key for keys in _DECIDED_BY.values() for key in keys if told.get(key, wanted[key]) != wanted[key]]
    for column, keys in _DECIDED_BY.items():
        if set(keys) & set(differing):
            place = earlier.schema.get_field_index(column)
            nothing = pa.nulls(earlier.num_rows, ROWS.field(column).type)
            earlier = earlier.set_column(place, ROWS.field(column), nothing)
    return earlier, ", ".join(f"evaluate.{key}: {told[key]}" for key in differing)


def _keys_of(config: EvaluateConfig) -> dict[str, str | int | float]:
    return {
        key: getattr(config, key) for key in ("max_tokens", *(key for keys in _DECIDED_BY.values() for key in keys))
    }


def _mean_loss(rows: pa.Table, model: str) -> float | None:
    """Mean loss in nats per token; None if there are no rows, or a row has no finite loss, which a mean would hide."""
    scored = rows.filter(pc.is_valid(rows[f"{model}_nll"]))
    broken = pc.any(pc.equal(rows[f"{model}_unscored"], NOT_FINITE)).as_py()
    if broken or not scored.num_rows:
        return None
    return float(pc.sum(scored[f"{model}_nll"]).as_py() / pc.sum(scored["num_tokens"]).as_py())


def _change(before: Floats, after: Floats, num_tokens: Floats, axis: int = -1) -> Floats:
    changed: Floats = (after.sum(axis) - before.sum(axis)) / num_tokens.sum(axis)
    return changed
