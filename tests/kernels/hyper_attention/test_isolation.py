"""A row must not depend on other documents, on padding or, in our mode, on any later token."""

import itertools

import pytest
import torch

from kernels.hyper_attention import hyper_attention
from tests.kernels.hyper_attention.attention_samples import (
    ALL_MODES,
    CHOOSE,
    EXACT,
    LOCAL,
    LOOK,
    NOMINATE,
    PAPER,
    gradients,
    inputs,
)

pytestmark = pytest.mark.usefixtures("small_steps")


@pytest.mark.parametrize(("config", "causal"), [(EXACT, False), (EXACT, True), *ALL_MODES])
def test_packed_is_each_document_alone(config, causal):
    lengths = [90, 1, 17, 130]
    tensors = inputs(Hq=2, Hk=1, T=sum(lengths) + 4)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = hyper_attention(*tensors, causal, config=config, cu_seqlens=ends)
    assert not packed[:, :, -4:].any()
    packed_gradients = gradients([packed], tensors)
    assert not any(x[:, :, -4:].any() for x in packed_gradients)
    ids = torch.repeat_interleave(torch.tensor([0, 3, 4, 9, -1]), torch.tensor([*lengths, 4]))[None]
    assert torch.equal(packed, hyper_attention(*tensors, causal, config=config, document_ids=ids))
    for start, stop in itertools.pairwise(ends.tolist()):
        alone = hyper_attention(*(x[:, :, start:stop] for x in tensors), causal, config=config)
        torch.testing.assert_close(packed[:, :, start:stop], alone)


def test_an_edited_document_changes_no_other():
    ids = torch.tensor([[0] * 50 + [1] * 50 + [-1] * 10])
    for config, causal in ALL_MODES:
        results = []
        for edit in (0.0, 1.0):
            tensors = inputs(T=110)
            for x in tensors:
                x.data[:, :, 50:] += edit
            results.append(hyper_attention(*tensors, causal, config=config, document_ids=ids)[:, :, :50])
        assert torch.equal(*results)


@pytest.mark.parametrize(
    "config",
    [
        LOCAL,
        LOOK,
        CHOOSE,
        NOMINATE,
        pytest.param(PAPER, marks=pytest.mark.xfail(strict=True, reason="blocks are cut by rank among all")),
    ],
    ids=["local", "look", "choose", "nominate", "paper"],
)
@pytest.mark.parametrize("edited", [40, 101, 127])
def test_the_future_changes_no_bit_of_the_past(config, edited):
    results = []
    for edit in (0.0, 3.0):
        tensors = inputs(T=160, dtype=torch.float32)
        for x in tensors:
            x.data[:, :, edited:] = x.data[:, :, edited:].flip(2) + edit
        out, lse = hyper_attention(*tensors, True, config=config, return_lse=True)
        past = [out[:, :, :edited], lse[:, :, :edited]]
        results.append([*past, *(x[:, :, :edited] for x in gradients(past, tensors))])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
