"""Sequence parallelism (DeepSpeed Ulysses): several workers share a pack, and each reads a slice of its tokens.

Most of a layer works token by token. Only attention needs the whole pack: before it, an all-to-all gives each worker
all tokens for some of the heads, and after it another one gives it all heads of its slice back. So the activations of a
pack are divided over the workers, and exact attention and HyperAttention run unchanged, on fewer heads.

The exchange is DeepSpeed's `DistributedAttention`, which works on gloo and NCCL; here keys and values are repeated
where there are fewer of their heads than workers. DeepSpeed's class for transformers (`UlyssesSPAttentionHF`) is not
used: it gathers the position ids in each layer too, and it changes the layers for good. DeepSpeed's engine is not told,
because for gradients, shards and checkpoints a worker with a slice is a worker like any other.

Source: arXiv:2309.14509, section 3; for grouped keys arXiv:2506.13996, section 3.2.1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from operators.student import packed_attention
from operators.student.packed_attention import documents_in_use, on_device, refuse_per_head, replaced_attention
from operators.student.slice_probe import has_dropout
from operators.student.sliced_pack import KEY, unfit_heads

_HYPER = "hyper_attention"
_EXCHANGED = (packed_attention.NAME, _HYPER)


@dataclass(frozen=True)
class SequenceGroup:
    """The workers that share a pack, with consecutive ranks.

    Attributes:
        size: number of these workers; 1 if each worker reads whole packs.
        place: of this worker among them, and of its slice in the pack.
        number: of this group among all.
        count: of such groups.
        group: of torch.distributed; None if `size` is 1.
    """

    size: int
    place: int
    number: int
    count: int
    group: Any = None

    def add_others(self, tensor: Tensor) -> None:
        """Sum over the group, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


@cache  # a group lives as long as the process group of all workers
def sequence_group(size: int) -> SequenceGroup:
    """This worker's group; the first call for a size must be made by every worker.

    Raises:
        ValueError: `size` does not divide the number of workers.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % size:
        raise ValueError(f"train: {KEY}: {size} does not divide train.num_workers: {world_size}; choose a divisor")
    group = None
    if size > 1:
        group, _ = dist.new_subgroups(group_size=size)  # type: ignore[no-untyped-call]
    return SequenceGroup(size, rank % size, rank // size, world_size // size, group)


@contextmanager
def shared_packs(model: Any, size: int) -> Iterator[None]:
    """A context in which `size` workers share each pack: attention exchanges what their slices need of each other.

    Args:
        model: the student, with its attention already chosen.
        size: number of workers that share a pack; 1 changes nothing.

    Raises:
        ValueError: the heads cannot be divided, or the student has dropout or an attention of its own.
    """
    if size == 1:
        yield
        return
    name = str(model.config.get_text_config()._attn_implementation)
    problem = unfit_heads(model.config, size)
    if not problem and has_dropout(model):
        problem = f"{size} workers share a pack, and the student has dropout; set it to 0 in its config.json"
    if not problem and name not in _EXCHANGED:
        problem = f"{size} workers share a pack, and attention {name} cannot be exchanged; set it to 1"
    if problem:
        raise ValueError(f"train: {KEY}: {problem}")
    inner = AttentionInterface()[name]
    attention = exchanging(inner, sequence_group(size), with_ids=name == _HYPER)
    with replaced_attention(name, attention, _mask_of(name)):
        yield


def exchanging(inner: Callable[..., Any], sequence: SequenceGroup, with_ids: bool) -> Callable[..., Any]:
    """What transformers calls in each layer: `inner` on the whole pack, for this worker's share of the heads.

    Args:
        inner: an attention function of transformers' interface.
        sequence: the workers that share the pack.
        with_ids: `inner` takes the document of each token in place of a mask, int64 [1, T].

    Returns:
        A function of a slice: query [1, Hq, T/n, D], key and value [1, Hk, T/n, D] to [1, T/n, Hq, D].
    """
    from deepspeed.sequence.layer import DistributedAttention

    def whole(query: Tensor, key: Tensor, value: Tensor, module: nn.Module, **options: Any) -> Tensor:
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        ids = _document_ids(documents_in_use(), str(query.device)) if with_ids else None
        out: Tensor = inner(module, *parts, ids, **options)[0]
        return out

    exchanged = DistributedAttention(whole, sequence.group, scatter_idx=2, gather_idx=1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, the exchange would have no gradient
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        refuse_per_head(module, options)
        key, value = (_enough_heads(tensor, sequence.size) for tensor in (key, value))
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return exchanged(*parts, 0, None, module, **options), None  # 0: dimension of the batch; None: no rotation

    exchanged_attention: Callable[..., Any] = attention
    return exchanged_attention


def _enough_heads(tensor: Tensor, workers: int) -> Tensor:
    """Keys or values [1, Hk, T, D], repeated so that each worker gets the head that its queries read."""
    repeats = workers // tensor.shape[1]
    return tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor


def _mask_of(name: str) -> Callable[..., None]:
    """The mask function: attention knows the documents, so there is never a mask; a window would need one."""

    def mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
        if local_size is not None and (name == _HYPER or local_size < max(documents_in_use())):
            raise ValueError(f"train: {KEY}: a layer has a window of {local_size} tokens; set it to 1")

    return mask


@lru_cache(maxsize=4)
def _document_ids(lengths: Sequence[int], device: str) -> Tensor | None:
    """The document of each token, int64 [1, T]; None for one document. Cached, because every layer needs the same."""
    if len(lengths) < 2:
        return None
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return on_device(ids, device)[None]
