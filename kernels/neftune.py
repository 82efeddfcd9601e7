"""NEFTune: uniform noise on the input embeddings while training, exact for each document of a pack.

The noise of an element is a hash of (seed, epoch, document, position, dimension), not a draw from a generator. It is
therefore the same alone or packed, on any number of ranks and after a resume, and there is no random state to save.
It costs about 14 integer operations per element of the embedding output and no memory between steps. On a GPU it is one
Triton launch, `neftune_triton.py`; this file has the torch path, for CPUs and as its reference.

Shape letters: B rows, T tokens, D embedding size, N documents.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["uniform", "gaussian", "symmetric"]
_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9


@dataclass(frozen=True)
class NoiseBatch:
    """What the noise of one forward pass depends on; every tensor is int64 and lies on the embedding's device.

    Attributes:
        documents: [B, T], number of the token's document within the batch, 0 <= document < N; any value on padding.
        positions: [B, T], position of the token within its document, from 0.
        lengths: [N], tokens of each document; 0 for a dummy, which gets no noise.
        uids: [N], a permanent identity of each document, such as a hash of its row id.
        padding: [B, T], true where a token belongs to no document; no noise there.
        epoch: noise differs between epochs.
        num_documents: those of length > 0.
    """

    documents: Tensor
    positions: Tensor
    lengths: Tensor
    uids: Tensor
    padding: Tensor
    epoch: int
    num_documents: int


def batch_of_pack(lengths: list[int], uids: list[int], num_tokens: int, epoch: int, device: str = "cpu") -> NoiseBatch:
    """Describe one pack, B = 1: documents one after the other, then padding up to `num_tokens`.

    Args:
        lengths: tokens of each document; empty for a pack of padding only.
        uids: signed 64-bit identity of each document.
        num_tokens: T.
        epoch: pass over the data.
        device: where the embedding's output lies.

    Raises:
        ValueError: the documents are longer than the pack, or there are not as many uids as lengths.
    """
    if len(lengths) != len(uids) or sum(lengths) > num_tokens:
        raise ValueError(
            f"neftune: {len(lengths)} documents of {sum(lengths)} tokens with {len(uids)} uids against a pack of "
            f"{num_tokens} tokens; lengths and uids must describe that pack"
        )
    # Only these few numbers are copied; the device computes the rest, and the host does not wait for it.
    lengths_N, uids_N = (_on_device(values, device) for values in ([*lengths, num_tokens - sum(lengths)], [*uids, 0]))
    numbers_N = torch.arange(len(lengths) + 1, device=device)
    documents_T = torch.repeat_interleave(numbers_N, lengths_N, output_size=num_tokens)
    starts_N = lengths_N.cumsum(0) - lengths_N
    positions_T = torch.arange(num_tokens, device=device) - starts_N[documents_T]
    return NoiseBatch(
        documents=documents_T[None],
        positions=positions_T[None],
        lengths=lengths_N.masked_fill(numbers_N == len(lengths), 0),
        uids=uids_N,
        padding=documents_T[None] == len(lengths),
        epoch=epoch,
        num_documents=sum(length > 0 for length in lengths),
    )


def slice_of_batch(batch: NoiseBatch, tokens: slice) -> NoiseBatch:
    """The batch for a worker that reads only these tokens of each row; documents keep their lengths and positions."""
    parts = {name: getattr(batch, name)[:, tokens] for name in ("documents", "positions", "padding")}
    return replace(batch, **parts)


def _on_device(values: list[int], device: str) -> Tensor:
    """The numbers as int64 on the device, copied from pinned memory: the host does not wait for a GPU's queued work."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)


class EmbeddingNoise:
    """The forward hook of `neftune`; call `set_batch` before each training forward pass."""

    def __init__(self, alpha: float, seed: int, kind: Kind = "uniform", gain: float = 1.0) -> None:
        self._alpha, self._seed, self._kind, self.gain = alpha, seed, kind, gain
        self._batch: NoiseBatch | None = None
        self._squares_N: Tensor | None = None

    def set_batch(self, batch: NoiseBatch) -> None:
        """Say which documents the next forward pass sees."""
        self._batch = batch
        self._squares_N = None

    def l2_per_document(self) -> Tensor:
        """L2 norm of the noise of the last training forward pass on each document, as it arrives at the first layer.

        Expected: alpha / sqrt(3) for each document, whatever its length. fp32, [documents of length > 0]; empty if no
        noise was added.
        """
        if self._squares_N is None or self._batch is None:
            return torch.zeros(0)
        return self._squares_N[self._batch.lengths > 0].sqrt()

    def l2_sum(self, add_others: Callable[[Tensor], None] | None = None) -> tuple[Tensor, int]:
        """Sum of `l2_per_document`, a scalar on the device, and the number of documents; the host does not wait.

        Args:
            add_others: adds in place, for each document, the sum of squares of the workers that read its other tokens.
        """
        if self._squares_N is None or self._batch is None:
            device = "cpu" if self._batch is None else self._batch.lengths.device
            return torch.zeros((), device=device), 0
        squares_N = self._squares_N.clone()
        if add_others is not None:
            add_others(squares_N)
        return squares_N.sqrt().sum(), self._batch.num_documents

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output_BTD: Tensor) -> Tensor:
        """The hook: the embedding's output plus noise, in the output's dtype; the output itself outside training."""
        if not (module.training and torch.is_grad_enabled()):
            return output_BTD
        if self._batch is None or self._batch.documents.shape != output_BTD.shape[:2]:
            seen = None if self._batch is None else tuple(self._batch.documents.shape)
            raise ValueError(
                f"neftune: set_batch described tokens of shape {seen} against an embedding output of "
                f"{tuple(output_BTD.shape)}; call set_batch with the same batch before each forward pass"
            )
        noisy_BTD, squares = self._noisy(output_BTD, self._batch)
        sums_N = torch.zeros(len(self._batch.lengths), device=squares.device)
        self._squares_N = sums_N.index_add_(0, self._batch.documents.flatten(), squares, alpha=self.gain**2)
        return noisy_BTD

    def _noisy(self, output_BTD: Tensor, batch: NoiseBatch) -> tuple[Tensor, Tensor]:
        """The output plus noise, and the sum of the squares of each token's noise, [B * T]."""
        alpha = self._alpha / self.gain
        if output_BTD.is_cuda:
            from kernels.neftune_triton import add_noise

            return add_noise(output_BTD, batch, alpha, word_of(self._seed, batch.epoch), self._kind)
        noise_BTD = scaled_noise(batch, output_BTD.shape[-1], alpha, self._seed, self._kind)
        return (output_BTD.float() + noise_BTD).to(output_BTD.dtype), noise_BTD.square().sum(-1).flatten()


@contextmanager
def neftune(
    embedding: nn.Module, alpha: float, seed: int, kind: Kind = "uniform", gain: float = 1.0
) -> Iterator[EmbeddingNoise]:
    """Add noise to the output of `embedding` inside the context, in training mode with gradients only.

    X' = emb(X) + alpha / sqrt(L * D) * eps, eps ~ U(-1, 1), where L is the length of the token's own document. Prompt
    and answer get noise alike; padding gets none. Computed and added in fp32, cast once.

    The hook neither reads the weight nor calls the module again, so ZeRO-3 partitioning, tied weights and LoRA are
    untouched. Register it before `deepspeed.initialize`.

    Args:
        embedding: the model's input embedding, `model.get_input_embeddings()`; the noise is added to its output.
        alpha: strength; 5 to 15 in the paper; 0 registers no hook at all.
        seed: with the batch's epoch, uids and positions it determines the noise.
        kind: distribution of eps. "uniform" is the paper's. "gaussian" and "symmetric" (plus or minus one amount, as in
            arXiv:2312.01523, without its second forward pass) have the same variance, so that alpha means the same.
        gain: constant by which the model multiplies the embedding's output, as Granite does; the noise is divided by
            it. Gemma's factor is inside its embedding, before the noise, and does not count.

    Yields:
        The hook, for `set_batch` and `l2_per_document`.

    Raises:
        ValueError: alpha is negative, gain is not positive, or the embedding already has this hook (noise would add
            up).

    Source: arXiv:2310.05914, Algorithm 1 and the footnote on unequal lengths; the authors' train.py masks padding.
    Differs: counter-based instead of a generator; documents of a pack are sequences of their own.
    """
    if alpha < 0:
        raise ValueError(f"neftune: alpha is {alpha}, below 0; use 0 to switch the noise off")
    if gain <= 0:
        raise ValueError(f"neftune: gain is {gain}, not above 0; give the factor after the embedding, or 1")
    if any(isinstance(hook, EmbeddingNoise) for hook in embedding._forward_hooks.values()):
        raise ValueError("neftune: this embedding already gets noise; leave the first context before the second")
    noise = EmbeddingNoise(alpha, seed, kind, gain)
    handle = embedding.register_forward_hook(noise) if alpha else None
    try:
        yield noise
    finally:
        if handle is not None:
            handle.remove()


def scaled_noise(batch: NoiseBatch, dimensions: int, alpha: float, seed: int, kind: Kind = "uniform") -> Tensor:
    """The noise itself, [B, T, D] in fp32; zero on padding and on dummies."""
    lengths_BT = batch.lengths[batch.documents].masked_fill(batch.padding, 0)
    # L * D in int64 and the root in fp32: in half precision the product overflows at 65504 and the noise vanishes.
    scale_BT = torch.where(lengths_BT > 0, alpha * (lengths_BT * dimensions).clamp(min=1).float().rsqrt(), 0.0)
    key_BT = _mix_64(batch.uids[batch.documents] ^ word_of(seed, batch.epoch))
    key_BT = _mix_64(key_BT + batch.positions * _signed(_GOLDEN_64, 64))
    dimension_D = torch.arange(dimensions, device=key_BT.device, dtype=torch.int32) * _signed(_GOLDEN_32, 32)
    hash_BTD = _mix_32(_low_word(key_BT)[..., None] + dimension_D)
    hash_BTD = _mix_32(hash_BTD ^ _low_word(key_BT >> 32)[..., None])
    # 24 bits, centred: exact in fp32, symmetric about zero, never quite -1 or 1.
    uniform_BTD = ((hash_BTD >> 8).float() + 0.5) * 2.0**-23
    return _shaped(uniform_BTD, kind) * scale_BT[..., None]


def _shaped(uniform_BTD: Tensor, kind: Kind) -> Tensor:
    """The same draws in another distribution of mean 0 and variance 1/3."""
    if kind == "gaussian":
        return torch.erfinv(uniform_BTD) * math.sqrt(2 / 3)
    if kind == "symmetric":
        return torch.sign(uniform_BTD) * math.sqrt(1 / 3)
    return uniform_BTD


def word_of(seed: int, epoch: int) -> int:
    """A signed 64-bit word from two integers, in Python's unbounded integers (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    word = (seed * _GOLDEN_64 + (epoch + 1) * 0xD1B54A32D192ED03) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return _signed(word ^ (word >> 31), 64)


def _signed(word: int, bits: int) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _low_word(words: Tensor) -> Tensor:
    """The lower 32 bits of an int64 tensor, as int32."""
    return (((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _mix_64(words: Tensor) -> Tensor:
    """splitmix64's finaliser on int64; torch shifts arithmetically, so the copied sign bits are masked off."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _mix_32(words: Tensor) -> Tensor:
    """murmur3's finaliser on int32."""
    words = (words ^ ((words >> 16) & 0xFFFF)) * _signed(0x85EBCA6B, 32)
    words = (words ^ ((words >> 13) & 0x7FFFF)) * _signed(0xC2B2AE35, 32)
    return words ^ ((words >> 16) & 0xFFFF)
