import pytest
from pydantic import ValidationError

from operators.student.pool import StudentPoolConfig, longest_context


def test_an_actor_asks_ray_for_gpus_only_where_it_has_some():
    assert StudentPoolConfig(cpus_per_actor=2).resources() == {"num_cpus": 2}
    assert StudentPoolConfig(gpus_per_actor=0.5).resources() == {"num_cpus": 1, "num_gpus": 0.5}


def test_results_depend_on_the_longest_sequence_and_the_number_format_and_on_no_device():
    assert StudentPoolConfig(gpus_per_actor=1).identity() == {"max_tokens": 2048, "precision": "fp32"}


def test_absurd_sizes_are_refused():
    for key in ("batch_rows", "batch_tokens", "max_tokens", "actors", "threads"):
        with pytest.raises(ValidationError, match=key):
            StudentPoolConfig.model_validate({key: 0})


def test_the_context_is_the_smaller_of_limit_and_positions(tiny_model: str) -> None:
    assert longest_context(tiny_model, 100) == 100
    assert longest_context(tiny_model, 10**6) == 2048
