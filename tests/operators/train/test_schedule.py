import pytest

from operators.train.schedule import remaining


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("cosine", [1, 0.854, 0.5, 0.146, 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("constant", [1, 1, 1, 1, 1]),
        ("wsd", [1, 1, 1, 1, 0]),
    ],
)
def test_a_schedule_has_its_shape(schedule, shares):
    assert [remaining(schedule, progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(shares, abs=1e-3)


def test_wsd_falls_linearly_over_the_last_fifth():
    assert remaining("wsd", 0.9) == pytest.approx(0.5)
