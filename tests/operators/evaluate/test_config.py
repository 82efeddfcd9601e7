import pytest

from operators.evaluate.config import EvaluateConfig


@pytest.mark.parametrize(
    ("named", "gpus", "longest"),
    [
        ({}, 1.0, 32768),
        ({"gpus_per_actor": 0}, 0, 32768),
        ({"max_tokens": 1024}, 1.0, 1024),
        ({"gpus_per_actor": 0.5, "max_tokens": 64}, 0.5, 64),
    ],
)
def test_evaluation_follows_the_student_unless_the_configuration_says_otherwise(
    named: dict[str, float], gpus: float, longest: int
) -> None:
    followed = EvaluateConfig.model_validate(named).following(gpus_per_worker=1.0, longest_pack=32768)
    assert (followed.gpus_per_actor, followed.max_tokens) == (gpus, longest)


def test_short_packs_do_not_shorten_what_is_scored() -> None:
    assert EvaluateConfig().following(gpus_per_worker=0, longest_pack=512).max_tokens == 2048
