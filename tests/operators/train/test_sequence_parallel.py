"""Workers that share packs train as one worker does; a group of one shows what attention gets and gives back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from operators.student.packed_attention import NAME, packed_attention, set_documents
from operators.student.packed_loss import load_trainable
from operators.train.config import TrainConfig
from operators.train.engine import prepare_process
from operators.train.sequence_parallel import SequenceGroup, exchanging, sequence_group, shared_packs

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTHS = [5, 9, 1]


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 4


@pytest.fixture
def alone(process_group):
    prepare_process(TrainConfig())
    set_documents(LENGTHS)
    yield SequenceGroup(1, 0, 0, 1, dist.group.WORLD)
    set_documents([])


def heads(*numbers):
    torch.manual_seed(0)
    return [torch.randn(1, number, sum(LENGTHS), 16, dtype=torch.float64, requires_grad=True) for number in numbers]


def test_a_worker_that_shares_with_nobody_gets_the_attention_it_exchanges(alone):
    parts = heads(4, 1, 1)
    out, _ = exchanging(packed_attention, alone, with_ids=False)(Layer(), *parts, None, scaling=0.2)
    expected, _ = packed_attention(Layer(), *parts, None, scaling=0.2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, parts, grad), torch.autograd.grad(expected, parts, grad))


def test_attention_that_wants_them_gets_the_documents_of_the_whole_pack(alone):
    seen = []

    def inner(module, query, key, value, mask, **options):
        seen.append(mask)
        return query.transpose(1, 2), None

    exchanging(inner, alone, with_ids=True)(Layer(), *heads(4, 2, 2), None)
    assert seen[0].tolist() == [[0] * 5 + [1] * 9 + [2]]
    set_documents([sum(LENGTHS)])
    exchanging(inner, alone, with_ids=True)(Layer(), *heads(4, 2, 2), None)
    assert seen[1] is None


def test_a_number_that_does_not_divide_the_workers_is_refused(process_group):
    assert sequence_group(1) == SequenceGroup(1, 0, 0, 1)
    with pytest.raises(ValueError, match=r"train\.sequence_parallel: 2 does not divide train\.num_workers: 1"):
        sequence_group(2)


def test_a_student_that_cannot_share_packs_is_refused_when_it_is_loaded(tiny_model):
    model = load_trainable(tiny_model, torch.float32)
    with pytest.raises(ValueError, match="3 workers cannot divide the 2 heads"), shared_packs(model, 3):
        pass
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="the student has dropout"), shared_packs(model, 2):
        pass
    model.config.attention_dropout = 0.0
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention eager cannot be exchanged"), shared_packs(model, 2):
        pass


def test_a_window_within_a_document_is_refused_in_the_first_pass(tiny_model, monkeypatch):
    model = load_trainable(tiny_model, torch.float32)
    monkeypatch.setattr("operators.train.sequence_parallel.sequence_group", lambda size: SequenceGroup(size, 0, 0, 1))
    set_documents(LENGTHS)
    from transformers import AttentionMaskInterface

    with shared_packs(model, 2):
        mask = AttentionMaskInterface()[NAME]
        assert mask(batch_size=1, local_size=9) is None
        with pytest.raises(ValueError, match=r"train\.sequence_parallel: a layer has a window of 8 tokens"):
            mask(batch_size=1, local_size=8)
    assert AttentionMaskInterface()[NAME] is not mask
    set_documents([])


@pytest.mark.slow
def test_two_and_four_workers_that_share_packs_give_losses_noise_and_weights_of_one(tmp_path):
    """Two per pack, four per pack (so keys are repeated), and two packs at a time; documents end within slices."""
    curve = [
        sys.executable,
        "benchmarks/same_curve.py",
        "--stages",
        "2",
        "--paths",
        "2:2,4:4,4:2",
        "--steps",
        "2",
        "--evaluate",
    ]
    sizes = ["--attention", "sdpa,hyper_attention", "--tokens", "1000", "--document", "250", "--limit", "1e-5"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [*curve, *sizes], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    rows = [line.split() for line in ended.stdout.splitlines()[1:]]
    assert len(rows) == 6
    assert max(float(row[5]) for row in rows) < 1e-4, "weights"
