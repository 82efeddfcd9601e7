import pytest

from operators.train.config import TrainConfig
from operators.train.memory import bytes_per_worker

BILLION = 10**9


@pytest.mark.parametrize(
    ("precision", "stage", "per_parameter"),
    [
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + 12 / 8),
        ("fp32", 2, 4 + 16 / 8),
        ("fp32", 3, 20 / 8),
        ("bf16", 0, 2 + 6 + 12 / 8),  # carried out as stage 1
        ("bf16", 1, 2 + 6 + 12 / 8),
        ("bf16", 2, 2 + 18 / 8),
        ("bf16", 3, 20 / 8),
    ],
)
def test_each_stage_shares_what_it_says(precision, stage, per_parameter):
    config = TrainConfig(num_workers=8, precision=precision, zero_stage=stage)
    assert bytes_per_worker(BILLION, config) == per_parameter * BILLION


def test_seven_billion_parameters_fit_eight_80_gb_gpus_only_where_they_are_sharded():
    qwen = 7_620 * 10**6
    needs = {stage: bytes_per_worker(qwen, TrainConfig(num_workers=8, zero_stage=stage)) for stage in (1, 2, 3)}
    assert needs[3] < needs[2] < needs[1]
    assert needs[3] < 20 * BILLION
    assert bytes_per_worker(qwen, TrainConfig(num_workers=1, zero_stage=3)) > 80 * BILLION
