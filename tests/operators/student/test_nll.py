"""Likelihoods in padded batches, compared with one example at a time, on a real tiny model."""

import math

import pytest
import torch

from operators.student.encode import IGNORED, Encoded
from operators.student.nll import like_length_groups, load_causal_lm, sum_nll
from operators.student.pool import StudentPoolConfig


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_causal_lm(tiny_model, StudentPoolConfig())


def test_the_number_format_is_configured_and_not_the_devices(tiny_model):
    assert load_causal_lm(tiny_model, StudentPoolConfig()).dtype is torch.float32
    assert load_causal_lm(tiny_model, StudentPoolConfig(precision="bf16")).dtype is torch.bfloat16


def example(length, seed):
    tokens = torch.randint(10, 49_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(tokens, [IGNORED] * (length // 2) + tokens[length // 2 :])


def test_sums_are_those_of_each_example_alone(model):
    examples = [example(length, seed) for seed, length in enumerate((5, 90, 17, 33, 90, 6))]
    sums = sum_nll(model, examples, batch_tokens=128)
    for one, got in zip(examples, sums, strict=True):
        tokens, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
        loss = model(input_ids=tokens, labels=labels).loss.item() * sum(label != IGNORED for label in one.labels[1:])
        assert got == pytest.approx(loss, rel=1e-5)
    assert sums[0] / 3 == pytest.approx(math.log(49_152), rel=0.1)  # random weights know nothing


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_groups_hold_every_place_once_and_fit(batch_tokens):
    lengths = [1 + n * 37 % 300 for n in range(100)]
    groups = list(like_length_groups(lengths, batch_tokens))
    assert sorted(place for group in groups for place in group) == list(range(100))
    for group in groups:
        longest = max(lengths[place] for place in group)
        assert len(group) == 1 or len(group) * longest <= batch_tokens
        padding = len(group) * longest - sum(lengths[place] for place in group)
        assert padding <= 256 + len(group) * longest / 10
