"""The values that evaluation and release pass on are validated when they are read, and immutable."""

import pytest
from pydantic import ValidationError

from operators.evaluate.results import NUM_QUANTILES, Evaluation, HeldOutLoss, PairedChange, Release

CHANGE = PairedChange(num_rows=30, estimate=-0.1, quantiles=tuple(n / 100 for n in range(1, NUM_QUANTILES + 1)))


@pytest.mark.parametrize(
    ("share", "change"), [(0.01, 0.01), (0.5, 0.5), (0.95, 0.95), (0.99, 0.99), (0.0, 0.01), (1.0, 0.99)]
)
def test_a_share_of_the_resamples_names_its_quantile(share: float, change: float) -> None:
    assert CHANGE.at(share) == change


def test_without_resamples_there_is_the_estimate_alone() -> None:
    assert PairedChange(num_rows=1, estimate=-0.1).at(0.95) == -0.1
    assert PairedChange().at(0.95) is None


def test_values_survive_json_and_invalid_ones_are_refused() -> None:
    evaluation = Evaluation(held_out_loss=HeldOutLoss(base=2.5, student=2.25, num_rows=30, change=CHANGE))
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    with pytest.raises(ValidationError, match="loss_of_base"):
        HeldOutLoss.model_validate({"loss_of_base": 2.5})
    with pytest.raises(ValidationError, match="finite"):
        HeldOutLoss(base=float("nan"))
    with pytest.raises(ValidationError, match="frozen"):
        Release(released=False, version="a").released = True  # type: ignore[misc]
