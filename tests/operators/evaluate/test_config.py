from typing import Any

import pytest

from operators.evaluate.config import EvaluateConfig


@pytest.mark.parametrize(
    ("named", "gpus", "precision", "longest"),
    [
        ({}, 1.0, "bf16", 32768),
        ({"gpus_per_actor": 0}, 0, "bf16", 32768),
        ({"max_tokens": 1024, "precision": "fp32"}, 1.0, "fp32", 1024),
        ({"gpus_per_actor": 0.5, "max_tokens": 64}, 0.5, "bf16", 64),
    ],
)
def test_evaluation_follows_the_student_unless_the_configuration_says_otherwise(
    named: dict[str, Any], gpus: float, precision: str, longest: int
) -> None:
    followed = EvaluateConfig.model_validate(named).following(
        gpus_per_worker=1.0, precision="bf16", longest_pack=32768, loss_on="all"
    )
    assert (followed.gpus_per_actor, followed.precision, followed.max_tokens) == (gpus, precision, longest)
    assert followed.loss_on == "all"


def test_short_packs_do_not_shorten_what_is_scored() -> None:
    assert (
        EvaluateConfig().following(gpus_per_worker=0, precision="fp32", longest_pack=512, loss_on="last").max_tokens
        == 2048
    )
