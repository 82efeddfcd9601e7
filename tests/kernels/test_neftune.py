import math

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from kernels.neftune import NoiseBatch, batch_of_pack, neftune, scaled_noise, slice_of_batch

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


def test_workers_with_slices_of_a_pack_add_its_noise_bit_for_bit():
    whole = batch_of_pack(LENGTHS, UIDS, 700, epoch=1)
    slices = [slice_of_batch(whole, slice(begin, begin + 175)) for begin in range(0, 700, 175)]
    parts = [scaled_noise(batch, D, ALPHA, 0) for batch in slices]
    assert torch.equal(torch.cat(parts, 1), scaled_noise(whole, D, ALPHA, 0))


def test_the_norm_of_a_document_is_summed_over_the_workers_that_read_it(embedding):
    whole = batch_of_pack(LENGTHS, UIDS, 700, epoch=0)
    with neftune(embedding, ALPHA, seed=0) as noise:
        squares, norms = [], []

        def others(found):
            squares.append(found.clone())
            found.copy_(sum(squares))

        for begin in (0, 350):
            noise.set_batch(slice_of_batch(whole, slice(begin, begin + 350)))
            embedding(torch.zeros(1, 350, dtype=torch.long))
            norms.append(noise.l2_sum(others))
        noise.set_batch(whole)
        embedding(torch.zeros(1, 700, dtype=torch.long))
        expected, count = noise.l2_sum()
    assert [documents for _, documents in norms] == [count, count] == [4, 4]
    torch.testing.assert_close(norms[1][0], expected)
    assert norms[0][0] < expected


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
        pytest.raises(ValueError, match="already gets noise"),
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


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "symmetric"])
def test_every_kind_of_noise_has_the_norm_of_the_paper(kind):
    batch = batch_of_pack(LENGTHS, UIDS, 700, 0)
    noise = scaled_noise(batch, D, ALPHA, 0, kind)[0]
    for part in noise.split([*LENGTHS, 3])[:-1]:
        assert part.norm().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.04)
    assert not noise[sum(LENGTHS) :].any()
    unit = scaled_noise(batch_of_pack([4096], [1], 4096, 0), D, ALPHA, 0, kind)[0] * math.sqrt(4096 * D) / ALPHA
    assert unit.mean().abs() < 2e-3
    assert torch.isfinite(unit).all()
    fourth = {"uniform": 9 / 5, "gaussian": 3.0, "symmetric": 1.0}[kind]  # kurtosis
    assert (unit**4).mean() / unit.square().mean() ** 2 == pytest.approx(fourth, rel=0.02)


class Padded:
    """Four rows of 11, 10, 7 and 4 tokens, padded to the longest as in a usual batch."""

    lengths = (11, 10, 7, 4)

    @classmethod
    def batch(cls):
        tokens = max(cls.lengths)
        position = torch.arange(tokens)[None].expand(len(cls.lengths), tokens)
        lengths = torch.tensor(cls.lengths)
        rows = torch.arange(len(cls.lengths))[:, None].expand_as(position)
        padding = position >= lengths[:, None]
        return NoiseBatch(rows, position, lengths, rows[:, 0].clone(), padding, epoch=0, num_documents=4)


def mean_norms(embedding, tokens, spans, draws=50):
    """Mean norm of the noise over each span (row, begin, end)."""
    sums = torch.zeros(len(spans))
    for _ in range(draws):
        noise = embedding(tokens) - embedding.weight[tokens]
        sums += torch.stack([noise[row, begin:end].norm() for row, begin, end in spans]).detach()
    return (sums / draws).tolist()


def test_transformers_hook_weakens_the_noise_of_short_rows_and_ours_does_not(embedding):
    tokens, expected = torch.zeros(4, 11, dtype=torch.long), ALPHA / math.sqrt(3)
    spans = [(row, 0, length) for row, length in enumerate(Padded.lengths)]
    torch.manual_seed(0)
    embedding.neftune_noise_alpha = ALPHA
    theirs = embedding.register_forward_hook(neftune_post_forward_hook)
    norms = mean_norms(embedding, tokens, spans)
    assert norms == pytest.approx([expected * math.sqrt(length / 11) for length in Padded.lengths], rel=0.02)
    theirs.remove()
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(Padded.batch())
        assert mean_norms(embedding, tokens, spans, draws=1) == pytest.approx([expected] * 4, rel=0.03)


def test_transformers_hook_treats_a_pack_as_one_document_and_ours_does_not(embedding):
    tokens, expected = torch.zeros(1, 700, dtype=torch.long), ALPHA / math.sqrt(3)
    ends = [sum(LENGTHS[: at + 1]) for at in range(len(LENGTHS))]
    spans = [(0, end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    torch.manual_seed(0)
    embedding.neftune_noise_alpha = ALPHA
    theirs = embedding.register_forward_hook(neftune_post_forward_hook)
    norms = mean_norms(embedding, tokens, spans, draws=5)
    assert norms == pytest.approx([expected * math.sqrt(length / 700) for length in LENGTHS], rel=0.03)
    theirs.remove()
    with neftune(embedding, ALPHA, seed=0) as noise:
        noise.set_batch(batch_of_pack(LENGTHS, UIDS, 700, epoch=0))
        assert mean_norms(embedding, tokens, spans, draws=1) == pytest.approx([expected] * 4, rel=0.04)


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
