"""The measures that each policy compares, and the keys that older manifests do not have."""

import pytest
from pydantic import ValidationError

from operators.select.config import Measure, Policy, SelectConfig


@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [
        ("none", None, None),
        ("ifd", "ifd", None),
        ("ifd_rifd", "ifd", "rifd"),
        ("perplexity", "perplexity", "perplexity"),
        ("judge", "judge", "judge"),
    ],
)
def test_a_policy_names_its_measures(policy: Policy, first: Measure | None, second: Measure | None) -> None:
    config = SelectConfig(policy=policy)
    assert (config.first_measure(), config.second_measure()) == (first, second)


def test_keys_that_came_later_are_no_part_of_the_identity_until_they_are_set() -> None:
    assert not {"reward_model", "judge_max_tokens"} & SelectConfig().identity().keys()
    assert SelectConfig(policy="judge", judge_max_tokens=99).identity()["judge_max_tokens"] == 99
    with pytest.raises(ValidationError, match="reward needs reward_model"):
        SelectConfig(policy="reward")
