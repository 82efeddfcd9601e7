import math

import pytest
import torch
from torch import nn

from kernels.neftune import batch_of_pack, neftune, scaled_noise

ALPHA, D = 5.0, 576
LENGTHS, UIDS = [3, 130, 500, 64], [11, -(2**63), 2**62 + 5, 7]


def noise_of(lengths, uids, tokens=None, epoch=0, seed=0, dimensions=D):
    batch = batch_of_pack(lengths, uids, tokens or sum(lengths), epoch)
    return scaled_noise(batch, dimensions, ALPHA, seed)[0]


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    return nn.Embedding(100, D).train()


def test_noise_is_uniform():
    unit = noise_of([4096], [1]) * math.sqrt(4096 * D) / ALPHA
    assert unit.abs().max() < 1
    assert unit.mean().abs() < 2e-3
    assert abs(3 * unit.square().mean() - 1) < 2e-3
    histogram = torch.histc(unit, bins=64, min=-1, max=1) / unit.numel() * 64
    assert (histogram - 1).abs().max() < 0.03


def test_noise_has_no_structure():
    unit = noise_of([4096], [1]) * math.sqrt(4096 * D) / ALPHA
    for lag in (1, 2, 64):
        assert (unit[:, :-lag] * unit[:, lag:]).mean().abs() < 2e-3
        assert (unit[:-lag] * unit[lag:]).mean().abs() < 2e-3
    for other in (noise_of([4096], [2]), noise_of([4096], [1], epoch=1), noise_of([4096], [1], seed=1)):
        assert (unit * other * math.sqrt(4096 * D) / ALPHA).mean().abs() < 2e-3


def test_norm_of_each_document_is_alpha_over_root_three(embedding):
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(batch_of_pack(LENGTHS, UIDS, 700, epoch=0))
        embedding(torch.zeros(1, 700, dtype=torch.long))
        assert noise.l2_per_document().tolist() == pytest.approx([ALPHA / math.sqrt(3)] * 4, rel=0.03)


def test_packed_is_alone_bit_for_bit():
    packed = noise_of(LENGTHS, UIDS, tokens=700).split([*LENGTHS, 3])
    for part, length, uid in zip(packed, LENGTHS, UIDS, strict=False):
        assert torch.equal(part, noise_of([length], [uid]))


def test_padding_and_dummies_get_no_noise():
    assert not noise_of(LENGTHS, UIDS, tokens=700)[sum(LENGTHS) :].any()
    assert not noise_of([], [], tokens=5).any()


def test_off_in_eval_and_without_gradients(embedding):
    tokens = torch.arange(10)[None]
    clean = embedding.weight[:10][None]
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(batch_of_pack([10], [1], 10, epoch=0))
        assert not torch.equal(embedding(tokens), clean)
        with torch.no_grad():
            assert torch.equal(embedding(tokens), clean)
        assert torch.equal(embedding.eval()(tokens), clean)


def test_an_exception_removes_the_hook(embedding):
    with pytest.raises(KeyError), neftune(embedding, ALPHA, seed=0):
        raise KeyError
    assert not embedding._forward_hooks
    assert torch.equal(embedding(torch.arange(10)), embedding.weight[:10])


def test_alpha_zero_registers_nothing(embedding):
    with neftune(embedding, 0, seed=0) as noise:
        assert not embedding._forward_hooks
        embedding(torch.arange(10)[None])
        assert noise.l2_per_document().numel() == 0


def test_a_second_hook_is_refused(embedding):
    with (
        neftune(embedding, ALPHA, seed=0),
        pytest.raises(ValueError, match="noised already"),
        neftune(embedding, ALPHA, seed=0),
    ):
        pass


def test_a_forward_pass_without_its_batch_is_refused(embedding):
    with neftune(embedding, ALPHA, seed=0) as noise:
        with pytest.raises(ValueError, match="set_batch"):
            embedding(torch.arange(10)[None])
        noise.set_batch(batch_of_pack([10], [1], 10, epoch=0))
        with pytest.raises(ValueError, match="set_batch"):
            embedding(torch.arange(11)[None])


def test_negative_alpha_and_a_wrong_pack_are_refused(embedding):
    with pytest.raises(ValueError, match="below 0"), neftune(embedding, -1, seed=0):
        pass
    with pytest.raises(ValueError, match="12 tokens"):
        batch_of_pack([12], [1], 11, epoch=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_keeps_the_noise(dtype):
    # L * D is 147456 here, over the largest fp16 number: computed in fp16 the noise would be zero.
    embedding = nn.Embedding(10, D, dtype=dtype).train()
    nn.init.zeros_(embedding.weight)
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(batch_of_pack([256], [1], 256, epoch=0))
        out = embedding(torch.zeros(1, 256, dtype=torch.long))
        assert out.dtype == dtype
        assert out.float().norm().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.02)


def test_gradient_passes_unchanged(embedding):
    tokens = torch.arange(10)[None]
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(batch_of_pack([10], [1], 10, epoch=0))
        embedding(tokens).sum().backward()
    assert torch.equal(embedding.weight.grad[:10], torch.ones(10, D))
