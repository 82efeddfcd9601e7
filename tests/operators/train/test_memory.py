import math

import pytest
import torch

from operators.student.packed_loss import load_trainable
from operators.train.config import TrainConfig
from operators.train.lora import LoraConfig, with_adapters
from operators.train.memory import StudentSize, bytes_per_worker, count_adapters, measure

BILLION = 10**9


@pytest.mark.parametrize(
    ("precision", "stage", "per_parameter"),
    [
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + 12 / 8),
        ("fp32", 2, 4 + 16 / 8),
        ("fp32", 3, 20 / 8),
        ("bf16", 0, 2 + 6 + 12 / 8),  # run as stage 1
        ("bf16", 1, 2 + 6 + 12 / 8),
        ("bf16", 2, 2 + 18 / 8),
        ("bf16", 3, 20 / 8),
    ],
)
def test_each_stage_shards_its_part_of_the_state(precision, stage, per_parameter):
    config = TrainConfig(num_workers=8, precision=precision, zero_stage=stage)
    assert bytes_per_worker(StudentSize(BILLION), config) == per_parameter * BILLION


def test_seven_billion_parameters_fit_eight_80_gb_gpus_only_where_they_are_sharded():
    qwen = StudentSize(7_620 * 10**6)
    needs = {stage: bytes_per_worker(qwen, TrainConfig(num_workers=8, zero_stage=stage)) for stage in (1, 2, 3)}
    assert needs[3] < needs[2] < needs[1]
    assert needs[3] < 20 * BILLION
    assert bytes_per_worker(qwen, TrainConfig(num_workers=1, zero_stage=3)) > 80 * BILLION


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"], r".*\.v_proj"])
def test_the_adapters_that_the_files_promise_are_those_that_are_trained(tiny_model, modules):
    lora = LoraConfig(r=4, target_modules=modules)
    size = measure(tiny_model, lora)
    model = with_adapters(load_trainable(tiny_model, torch.float32), lora, seed=0)
    assert size.adapters == sum(math.prod(each.shape) for each in model.parameters() if each.requires_grad)
    assert size.parameters == sum(math.prod(each.shape) for each in model.parameters()) - size.adapters
    assert measure("no/such/folder", lora) == StudentSize()


def test_a_student_with_adapters_needs_its_weights_and_little_more():
    size = StudentSize(7_620 * 10**6, count_adapters({"model.layers.0.q_proj.weight": [4096, 4096]}, LoraConfig(r=16)))
    assert size.adapters == 16 * 8192
    one_gpu = bytes_per_worker(size, TrainConfig(num_workers=1, lora=LoraConfig(r=16)))
    assert 15.2 * BILLION < one_gpu < 15.3 * BILLION
