from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from operators.evaluate.config import EvaluateConfig
from operators.evaluate.model_actor import MEASURED
from operators.evaluate.results import PairedChange
from operators.evaluate.rows import (
    answers_of,
    change_on_common_rows,
    comparable,
    compare_losses,
    join_measurements,
    paired_change,
    read_rows,
    write_rows,
)


def measured(*rows: tuple[str, float | None, int, str | None]) -> pa.Table:
    names = ("row_id", "nll", "num_tokens", "unscored")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=MEASURED)


def column(values: Any) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values)])


def test_models_are_compared_row_by_row_whatever_the_order() -> None:
    base = measured(("b", 6.0, 2, None), ("a", 4.0, 2, None))
    student = measured(("a", 3.0, 2, None), ("b", 5.0, 2, None))
    rows = join_measurements(base, student)
    assert rows["row_id"].to_pylist() == ["a", "b"]
    loss = compare_losses(rows)
    assert (loss.base, loss.student, loss.num_tokens, loss.num_rows) == (2.5, 2.0, 4, 2)
    assert loss.change.estimate == -0.5
    assert set(loss.change.quantiles) == {-0.5}, "both rows change by the same"


def test_rows_without_a_loss_are_counted_and_a_broken_model_has_none() -> None:
    base = measured(("a", 4.0, 2, None), ("b", None, 0, "over_max_tokens"), ("c", 2.0, 2, None))
    student = measured(("a", 3.0, 2, None), ("b", None, 0, "over_max_tokens"), ("c", None, 2, "not_finite"))
    loss = compare_losses(join_measurements(base, student))
    assert (loss.base, loss.student) == (1.5, None)
    assert (loss.num_rows, loss.unscored) == (1, {"over_max_tokens": 1, "not_finite": 1})


def test_models_that_read_other_tokens_are_refused_and_the_row_is_named() -> None:
    base, student = measured(("a", 4.0, 2, None)), measured(("a", 3.0, 3, None))
    with pytest.raises(ValueError, match="the student reads 3 response tokens in held-out row a, its base model 2"):
        join_measurements(base, student)


def test_no_row_and_one_row_have_no_quantiles() -> None:
    assert paired_change(column(np.zeros(0)), column(np.zeros(0)), column(np.zeros(0))) == PairedChange()
    one = paired_change(column([4.0]), column([3.0]), column([2]))
    assert (one.num_rows, one.estimate, one.quantiles) == (1, -0.5, ())
    assert one.at(0.9) == -0.5


def test_the_bootstrap_covers_a_known_difference_as_often_as_it_says() -> None:
    """Of 200 samples with a true change of -0.1, about 90 % have it between the 5th and the 95th percentile."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        tokens = rng.integers(20, 200, size=60)
        old = rng.normal(2.0, 0.4, size=60) * tokens
        new = old - 0.1 * tokens + rng.normal(0, 0.3, size=60) * tokens
        change = paired_change(column(old), column(new), column(tokens))
        low, high = change.at(0.05), change.at(0.95)
        assert low is not None
        assert high is not None
        covered += low <= -0.1 <= high
    assert 160 <= covered <= 195


def test_pairing_sees_what_two_independent_intervals_would_not() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(20, 200, size=100)
    old = rng.normal(2.0, 0.8, size=100) * tokens
    change = paired_change(column(old), column(old - 0.01 * tokens), column(tokens))
    assert change.quantiles[-1] < 0, "every row gets better by the same small amount"


def test_the_bootstrap_is_the_same_every_time_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    tokens, old, new = rng.integers(5, 50, 30), rng.random(30), rng.random(30)
    whole = paired_change(column(old), column(new), column(tokens))
    assert paired_change(column(old), column(new), column(tokens)) == whole
    monkeypatch.setattr("operators.evaluate.rows.RESAMPLED_AT_ONCE", 300)
    pieces = paired_change(column(old), column(new), column(tokens))
    assert pieces.estimate == whole.estimate
    assert pieces.at(0.5) == pytest.approx(whole.at(0.5), abs=0.01)


def test_an_earlier_student_is_compared_on_the_rows_that_both_scored(tmp_path: Path) -> None:
    base = measured(("a", 4.0, 2, None), ("b", 4.0, 2, None), ("d", 9.0, 3, None))
    new = join_measurements(base, measured(("a", 3.0, 2, None), ("b", 2.0, 2, None), ("d", 6.0, 3, None)))
    old_base = measured(("a", 4.0, 2, None), ("b", 4.0, 2, None), ("c", 1.0, 1, None))
    old = join_measurements(old_base, measured(("a", 2.0, 2, None), ("b", 2.0, 2, None), ("c", 1.0, 1, None)))
    write_rows(old, str(tmp_path / "v1.parquet"))
    kept = read_rows(str(tmp_path / "v1.parquet"))
    assert kept is not None
    assert kept.equals(old)
    change = change_on_common_rows(new, kept)
    assert (change.num_rows, change.estimate) == (2, 0.25)
    assert read_rows(str(tmp_path / "gone.parquet")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["v1.parquet"]


def test_answers_are_those_of_the_samples() -> None:
    base = measured(("a", 4.0, 2, None), ("b", 4.0, 2, None))
    answered = base.set_column(4, "answer", pa.array(["yes", None], pa.string()))
    answered = answered.set_column(5, "answer_tokens", pa.array([1, None], pa.int32()))
    found = answers_of(join_measurements(answered, base), "base")
    assert {row_id: (answer.text, answer.num_tokens) for row_id, answer in found.items()} == {"a": ("yes", 1)}
    assert answers_of(join_measurements(answered, base), "student") == {}


ALONE = measured(("a", 100.0, 100, None), ("b", 300.0, 300, None))


@pytest.mark.parametrize(
    ("key", "before", "after", "losses", "answers"),
    [
        ("loss_on", "all", "recycled", 0, 2),
        ("precision", "fp32", "bf16", 0, 2),
        ("max_new_tokens", 64, 256, 2, 0),
        ("repetition_penalty", 1.0, 1.2, 2, 0),
        ("max_tokens", 1024, 4096, 2, 2),
    ],
)
def test_measurements_of_an_earlier_student_under_other_keys_are_not_compared(
    tmp_path: Path, key: str, before: Any, after: Any, losses: int, answers: int
) -> None:
    path, rows = str(tmp_path / "rows.parquet"), join_measurements(ALONE, ALONE)
    for column, values in (("student_answer", ["x", "y"]), ("student_answer_tokens", [1, 1])):
        at = rows.schema.get_field_index(column)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    write_rows(rows, path, EvaluateConfig.model_validate({key: before}))
    stored = read_rows(path)
    earlier, told = comparable(stored, EvaluateConfig.model_validate({key: after}))
    assert change_on_common_rows(rows, earlier).num_rows == losses
    assert len(answers_of(earlier, "student")) == answers
    assert told == ("" if losses == answers else f"evaluate.{key}: {before}")
    assert comparable(stored, EvaluateConfig.model_validate({key: before})) == (stored, "")


def test_measurements_that_say_nothing_about_their_keys_are_still_compared(tmp_path: Path) -> None:
    path, rows = str(tmp_path / "rows.parquet"), join_measurements(ALONE, ALONE)
    write_rows(rows, path)
    assert comparable(read_rows(path), EvaluateConfig(loss_on="all", precision="bf16")) == (rows, "")
