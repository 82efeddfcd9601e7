"""The win rate at equal length: known models, and pairs that decide nothing."""

import numpy as np
import pytest

from operators.evaluate.length_control import length_controlled_win_rate


def judged(quality: float, effect: float, mean_longer: float, pairs: int = 4000) -> tuple[list[float], list[tuple]]:
    """Verdicts of a judge with a known taste for long answers, on a student whose answers are longer on average."""
    random = np.random.default_rng(3)
    longer = random.normal(mean_longer, 50, pairs).round()
    odds = quality + effect * np.tanh(longer / longer.std())
    won = (random.random(pairs) < 1 / (1 + np.exp(-odds))).astype(float)
    return won.tolist(), [(300, 300 + int(more)) for more in longer]


@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_the_quality_of_a_student_with_longer_answers_is_found(quality: float, effect: float) -> None:
    won, lengths = judged(quality, effect, mean_longer=60)
    expected = 1 / (1 + np.exp(-quality))
    assert length_controlled_win_rate(won, lengths) == pytest.approx(expected, abs=0.04)
    if effect:
        assert np.mean(won) > expected + 0.1, "without the effect of length this test would show nothing"


def test_the_rate_is_one_less_the_other_models() -> None:
    won, lengths = judged(0.4, 1.0, mean_longer=20, pairs=60)
    won[0] = 0.5
    rate = length_controlled_win_rate(won, lengths)
    swapped = length_controlled_win_rate([1 - each for each in won], [(student, base) for base, student in lengths])
    assert rate is not None
    assert swapped == pytest.approx(1 - rate, abs=1e-4)


def test_pairs_of_equal_length_give_the_plain_rate_and_none_give_none() -> None:
    assert length_controlled_win_rate([1, 0.5, 0, 1], [(10, 12)] * 4) == 0.625
    assert length_controlled_win_rate([], []) is None


def test_a_student_that_wins_every_pair_has_all_wins_at_any_length() -> None:
    assert length_controlled_win_rate([1, 1, 1], [(10, 20), (10, 5), (10, 11)]) == pytest.approx(1, abs=1e-4)


def test_a_longer_answer_that_always_wins_has_a_finite_effect() -> None:
    rate = length_controlled_win_rate([1, 1, 0, 0], [(10, 30), (10, 20), (20, 10), (30, 10)])
    assert rate == pytest.approx(0.5, abs=0.01)
