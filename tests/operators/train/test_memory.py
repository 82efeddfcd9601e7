import math

import pytest
import torch

from operators.student.packed_loss import load_trainable
from operators.train.config import TrainConfig
from operators.train.lora import LoraConfig, with_adapters
from operators.train.memory import (
    StudentSize,
    activation_bytes,
    bytes_per_worker,
    copied_bytes,
    count_adapters,
    host_bytes_per_worker,
    measure,
)

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


def test_quantised_weights_take_little_more_than_four_bits(tiny_model):
    lora = LoraConfig(r=16)
    found = measure(tiny_model, lora)
    assert found.linear == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    size = StudentSize(7_620 * 10**6, 40 * 10**6, 6_500 * 10**6)
    config = TrainConfig(num_workers=1, lora=lora, quantize="4bit")
    whole = bytes_per_worker(size, config.model_copy(update={"quantize": "none"}))
    assert whole - bytes_per_worker(size, config) == pytest.approx(6.5 * BILLION * (2 - 0.516), rel=1e-3)


def test_what_is_offloaded_from_a_gpu_is_in_the_memory_of_the_host():
    size, gpus = StudentSize(BILLION), {"num_workers": 8, "gpus_per_worker": 1, "zero_stage": 3}
    plain, optimizer, all_of_it = (
        TrainConfig(**gpus, offload=offload) for offload in ("none", "optimizer", "optimizer_and_weights")
    )
    whole = bytes_per_worker(size, plain)
    assert host_bytes_per_worker(size, plain) == 0
    assert bytes_per_worker(size, optimizer) == 2 * BILLION / 8
    assert host_bytes_per_worker(size, optimizer) == whole - 2 * BILLION / 8
    assert (bytes_per_worker(size, all_of_it), host_bytes_per_worker(size, all_of_it)) == (0, whole)
    on_cpus = all_of_it.model_copy(update={"gpus_per_worker": 0})
    assert (bytes_per_worker(size, on_cpus), host_bytes_per_worker(size, on_cpus)) == (whole, 0)


@pytest.mark.parametrize(
    ("changes", "per_parameter"),
    [
        ({"precision": "fp32", "zero_stage": 2, "num_workers": 2}, 4 + 4 + 8),
        ({"precision": "fp32", "zero_stage": 0}, 4 + 8),
        ({"precision": "bf16", "zero_stage": 3}, 4 + 8),
        ({"checkpoint_in_background": False}, 0),
        ({"checkpoint_every_steps": 0}, 0),
        ({"max_steps": 100}, 0),
        ({"max_steps": 100, "checkpoint_every_minutes": 10}, 2 + 4 + 8),
        ({"max_steps": 100, "evaluate_every_steps": 10}, 2 + 4 + 8),
    ],
)
def test_copies_for_checkpoints_are_one_state_over_all_workers(changes, per_parameter):
    assert copied_bytes(StudentSize(BILLION), TrainConfig(**changes)) == per_parameter * BILLION


def test_an_elastic_training_is_weighed_with_its_fewest_workers():
    size = StudentSize(BILLION)
    elastic = bytes_per_worker(size, TrainConfig(num_workers=8, min_workers=2, zero_stage=3))
    assert elastic == bytes_per_worker(size, TrainConfig(num_workers=2, zero_stage=3))


def test_activations_are_divided_over_the_workers_that_share_a_pack(tiny_model):
    def kept(**changes):
        return activation_bytes(tiny_model, TrainConfig(num_workers=4, **changes), 4096)

    assert kept() == 2 * 4096 * 2 * (12 * 64 + 4 * 128)  # bytes x tokens x layers x (hidden and inner size)
    assert kept(packs_per_pass=2) == 2 * kept()
    assert kept(sequence_parallel=4) == kept() / 4
    assert kept(activation_checkpointing=True) == 2 * 4096 * (2 * 64 + 12 * 64 + 4 * 128)
    assert activation_bytes("no/such/folder", TrainConfig(), 4096) == 0


def test_activations_are_those_that_the_backward_pass_keeps(tiny_model):
    model, tokens, kept = load_trainable(tiny_model, torch.float32), 512, {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor stays, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    found = sum(size for place, (size, _) in kept.items() if place not in weights)
    assert activation_bytes(tiny_model, TrainConfig(precision="fp32"), tokens) == pytest.approx(found, rel=0.15)
