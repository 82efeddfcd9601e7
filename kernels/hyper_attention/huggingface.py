"""HyperAttention in Hugging Face models: importing this module registers `attn_implementation="hyper_attention"`.

Two registrations work together. The mask function returns at most one integer for each token, its document (-1 for
padding), where transformers' own would make a T x T mask; the attention function reads it. HyperAttention cannot do
decoding with a KV cache, sliding or chunked windows, custom masks, or heads whose size it refuses or whose values have
another size than their keys (DeepSeek V2, V3): such calls get exact attention from torch.

Sizes come, in this order, from `patched_attention`, from `model.config.hyper_attention` (a dictionary of the fields of
`HyperAttentionConfig`), or are the defaults in mode "causal_local" (mode "paper" where a module is not causal).

Shape letters: B batch, Hq query heads, Hk key heads, T tokens, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.hyper_attention.api import HEAD_SIZES, hyper_attention
from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import PADDING

NAME = "hyper_attention"
_EXACT = HyperAttentionConfig(exact_below=1 << 62)


@contextmanager
def patched_attention(
    model: nn.Module, config: HyperAttentionConfig, layers: str | Sequence[int] = "all"
) -> Iterator[list[int]]:
    """Use HyperAttention in some layers of `model` inside the context; afterwards the model has its old attention back.

    The other layers stay exact, and the memory of their masks stays linear in the number of tokens.

    Args:
        model: a transformers model, or a wrapper that passes `config` and `set_attn_implementation` on.
        config: sizes for these layers.
        layers: "all", "last:n", "first:n", "even", "odd", or the indices of layers, from 0.

    Yields:
        The indices of the patched layers.

    Raises:
        ValueError: the model has no layer with such an index, or `layers` is not understood.
    """
    modules = _attention_modules(model)
    chosen = _chosen(layers, len(modules))
    before = str(model.config._attn_implementation)  # type: ignore[union-attr]
    saved = [vars(module).get(NAME) for module in modules]
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    try:
        for index, module in enumerate(modules):
            vars(module)[NAME] = config if index in chosen else _EXACT
        yield chosen
    finally:
        for module, old in zip(modules, saved, strict=True):
            if old is None:
                vars(module).pop(NAME, None)
            else:
                vars(module)[NAME] = old
        model.set_attn_implementation(before)  # type: ignore[operator]


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """Self-attention modules in the order of their layers."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if not found:
        raise ValueError("hyper_attention: model has no attention module with layer_idx and is_causal; it needs one")
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def _chosen(layers: str | Sequence[int], count: int) -> list[int]:
    """Indices of the layers that `layers` means."""
    if not isinstance(layers, str):
        wrong = [index for index in layers if not 0 <= index < count]
        if wrong:
            raise ValueError(f"hyper_attention: layers has {wrong}; the model's layers are 0 to {count - 1}")
        return sorted(set(layers))
    if layers in ("all", "even", "odd"):
        return list(range(count))[{"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[layers]]
    end, _, number = layers.partition(":")
    if end not in ("last", "first") or not number.isdecimal():
        raise ValueError(f"hyper_attention: layers is {layers!r}; use all, last:n, first:n, even, odd or a list")
    if int(number) > count:
        raise ValueError(f"hyper_attention: layers is {layers!r}, but the model has {count} layers")
    return list(range(count - int(number), count) if end == "last" else range(int(number)))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [B, Hq, T, D] to output [B, T, Hq, D]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"hyper_attention: {type(module).__name__} uses {name}; use another attn_implementation")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # Not `in`: torch.compile cannot look a size up in a range.
    unfit = not HEAD_SIZES[0] <= key.shape[3] <= HEAD_SIZES[-1] or value.shape[3] != key.shape[3]
    if unfit and attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = _pairs(attention_mask, causal)
    exact_mask = attention_mask is not None and attention_mask.ndim == 4
    if exact_mask or unfit or query.shape[2] != key.shape[2] or query.shape[2] == 1:
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    if dropout:
        raise ValueError(f"hyper_attention: dropout is {dropout}; attention dropout must be 0")
    config = _config_of(module, causal)
    out = hyper_attention(query, key, value, causal, config=config, scale=scaling, document_ids=attention_mask)
    assert isinstance(out, Tensor)  # noqa: S101 - for the type checker: no return_lse
    return out.transpose(1, 2).contiguous(), None


def _pairs(ids: Tensor, causal: bool) -> Tensor:
    """Torch's mask, bool [B, 1, T, T], of documents [B, T]; padding reads padding, so that no row of it is empty."""
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return same.tril() if causal else same


def _config_of(module: nn.Module, causal: bool) -> HyperAttentionConfig:
    patched = vars(module).get(NAME)
    if isinstance(patched, HyperAttentionConfig):
        return patched
    sizes = getattr(getattr(module, "config", None), NAME, None) or {}
    return HyperAttentionConfig(**{"mode": "causal_local" if causal else "paper", **sizes})


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None, or the document of each token, int64 [B, T]; else torch's mask, bool [B, 1, T, S]: then attention is exact.

    A token begins a document if the mask function does not let it read the token before it, so this asks O(T) pairs.
    Padding inside a document needs torch's mask; compiled code cannot ask for it, and there padding ends a document.
    """
    plain_mask = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "use_vmap": use_vmap,
        "device": device,
    }
    if q_length != kv_length or q_length == 1 or local_size is not None or use_vmap:
        return sdpa_mask(**plain_mask, **kwargs)  # type: ignore[no-any-return]
    batch = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(q_length - 1, device=device)[None]
    head = torch.zeros_like(batch)
    joined = _asked(mask_function, batch, head, token + 1, token)
    ahead = _asked(mask_function, batch, head, token, token + 1)
    # Ids rise where a token cannot read its neighbour. They can express causal and symmetric patterns only.
    if not torch.compiler.is_compiling() and ahead.any() and not torch.equal(ahead, joined):
        return sdpa_mask(**plain_mask, **kwargs)  # type: ignore[no-any-return]
    ids = torch.nn.functional.pad((~joined).long().cumsum(1), (1, 0))
    if attention_mask is not None:
        ids = torch.where(attention_mask.bool(), ids, PADDING)
    if torch.compiler.is_compiling():
        return ids
    if attention_mask is not None and _splits_a_document(ids):
        return sdpa_mask(**plain_mask, **kwargs)  # type: ignore[no-any-return]
    if not ids.any():
        return None
    if ids.is_inference():
        with torch.inference_mode(False):  # so that the layers share what the host reads of the ids
            ids = ids.clone()
    return ids


def _splits_a_document(ids: Tensor) -> bool:
    """Whether padding lies between tokens of one document, which would be two documents for HyperAttention."""
    latest = ids.cummax(1).values[:, :-1]
    resumes = (ids[:, 1:] != PADDING) & (ids[:, :-1] == PADDING) & (ids[:, 1:] == latest)
    return bool(resumes.any())


def _asked(mask_function: Callable[..., Any], batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What the mask function answers, bool [B, T - 1]; one without padding may answer for one row only."""
    answer = torch.as_tensor(mask_function(batch, head, query, key), device=batch.device)
    return answer.expand(len(batch), query.shape[1])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
