"""Exact attention of packed documents, one by one: it builds no T x T mask and reads no key of another document.

transformers' own sdpa builds a dense mask for a pack, which costs memory and time quadratic in the whole pack. Here the
caller gives the lengths of the documents, the mask function returns None if attention is only causal, and the attention
function takes one document after the other (with torch's varlen kernel on GPUs, in half precision).

Importing this module registers `attn_implementation="packed_documents"`.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from operators.student.sliced_pack import smallest_window

NAME = "packed_documents"
# The two ways in which this attention runs; heads that varlen cannot take go the second way in any case.
BY_DOCUMENT = ("varlen", "sdpa per document")
_LARGEST_HEAD = 256  # of flash attention
_documents: list[int] = []  # lengths in the current pack; recomputation in the backward pass needs them too


def use_packed_attention(model: Any) -> None:
    """Make `model` attend document by document; a model that does not use transformers' attention interface stays.

    One without sdpa stays too, such as GPT-OSS: its layers have sinks, which only its own attention reads, with a mask.
    """
    if not getattr(model, "_supports_sdpa", False):
        return
    with suppress(ValueError):
        model.set_attn_implementation(NAME)


def attention_in_use(model: Any, longest: int = 0) -> str:
    """For the report: one of `BY_DOCUMENT`, or the name of another implementation, such as "sdpa".

    Args:
        model: the student.
        longest: tokens of the longest document; if it is given, masks in layers with a window are told too.
    """
    name = str(model.config.get_text_config()._attn_implementation)
    parameter = next(model.parameters())
    if name == NAME:
        name = BY_DOCUMENT[0] if _has_varlen(parameter.device.type, parameter.dtype) else BY_DOCUMENT[1]
    return f"{name}, with a mask in layers with a window" if longest and masked_window(model, longest) else name


def masked_window(model: Any, longest: int) -> int:
    """Tokens of the shortest window of a layer, if such layers need a mask of tokens x tokens over a pass; else 0.

    Args:
        model: the student, with the attention of this module or HyperAttention; others always have such a mask.
        longest: tokens of the longest document. A window hides nothing in documents that are not longer than it, and
            the attention of this module makes use of that.
    """
    window, name = smallest_window(model.config) or 0, model.config.get_text_config()._attn_implementation
    return 0 if name == NAME and longest <= window else window


def set_documents(lengths: Sequence[int]) -> None:
    """Set the lengths of the documents of the next forward pass, in their order; they fill its one row."""
    _documents[:] = lengths


def documents_in_use() -> tuple[int, ...]:
    """The lengths that `set_documents` got last."""
    return tuple(_documents)


@contextmanager
def replaced_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, all models of this process with `attn_implementation=name` use these two functions."""
    interfaces = (AttentionInterface(), attention), (AttentionMaskInterface(), mask)
    before = [interface[name] for interface, _ in interfaces]
    try:
        for interface, function in interfaces:
            interface.register(name, function)
        yield
    finally:
        for (interface, _), function in zip(interfaces, before, strict=True):
            interface.register(name, function)


class PerHeadError(ValueError):
    """A layer gives attention a value for each head, which is not divided like the heads."""


def refuse_per_head(module: nn.Module, options: dict[str, Any]) -> None:
    """Refuse what a layer gives to attention beside queries, keys and values, if it belongs to single heads.

    Raises:
        PerHeadError: there is a sink or a bias.
    """
    given = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if given:
        raise PerHeadError(f"{type(module).__name__} gives attention {given[0]}, with a value for each head")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # each pack has another number of documents
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [1, Hq, T, D], key and value [1, Hk, T, D] to [1, T, Hq, D].

    Raises:
        PerHeadError: the layer gives a sink or a bias, which this attention would leave out.
    """
    refuse_per_head(module, kwargs)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    tokens = query.shape[2]
    if attention_mask is not None or len(_documents) < 2 or not tokens == key.shape[2] == sum(_documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    if not dropout and _varlen_fits(query, value) and _has_varlen(query.device.type, query.dtype):
        return _varlen_attention(query, key, value, scaling), None
    parts = zip(*(torch.split(tensor, _documents, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts], 1), None


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel takes heads of these sizes; others, as in Gemma 4 and DeepSeek-V3, it refuses."""
    size = query.shape[-1]
    return size == value.shape[-1] and size <= _LARGEST_HEAD and size % 8 == 0


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    known = _varlen_parameters()
    if scaling is not None and "scale" not in known:
        query = query * (scaling * math.sqrt(query.shape[-1]))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    if groups > 1 and "enable_gqa" not in known:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    offers: dict[str, Any] = {"scale": scaling, "enable_gqa": groups > 1, "is_causal": True, "window_size": (-1, 0)}
    offsets, longest = _offsets(tuple(_documents), query.device), max(_documents)
    out: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), offsets, offsets, longest, longest,
        **{name: offer for name, offer in offers.items() if name in known},
    )  # fmt: skip
    return torch.unsqueeze(out, 0)


@cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of this torch's varlen attention: 2.10 has `is_causal`, later ones a window, a scale, grouped keys."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=4)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The begin of each document and the end of the last; cached, because every layer needs the same."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return on_device(offsets, str(device))


def on_device(tensor: Tensor, device: str) -> Tensor:
    """Copy to a device without waiting for its queued work; from pageable memory the host would have to wait."""
    if not device.startswith("cuda"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@cache
def _has_varlen(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length flash attention can run: CUDA, half precision, Ampere or newer."""
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # as of torch 2.10
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None if the attention function knows the documents and a window covers each of them; else sdpa's mask."""
    told = batch_size == 1 and _documents and q_length == kv_length == sum(_documents) and attention_mask is None
    if told and (local_size is None or max(_documents) <= local_size):
        return None
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)
