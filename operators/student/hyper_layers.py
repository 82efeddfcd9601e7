"""Finds the layers of a student that can use HyperAttention; the others stay exact."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

EXACT = "have a sliding or chunked window, or heads that are not 16 to 256 wide or not as wide for values as for keys"
_FULL = ("full_attention", "attention")


def hyper_attention_layers(config: "PretrainedConfig", layers: str | Sequence[int]) -> tuple[list[int], list[int]]:
    """The attention layers that `layers` means, and those of them that can use HyperAttention.

    The others stay exact: `EXACT` says why. This allocates no weights.

    Args:
        config: the student's.
        layers: all, last:n, first:n, even, odd, or indices.

    Raises:
        ValueError: the student has no attention layer, or none with such an index, or its attention has what neither
            HyperAttention nor the exact attention of the other layers can do: sinks, caps, dropout.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kernels.hyper_attention import HyperAttentionConfig
    from kernels.hyper_attention.huggingface import patched_attention

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    with patched_attention(model, HyperAttentionConfig(), layers) as chosen:
        modules = [
            module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
        ]
    modules.sort(key=lambda module: int(module.layer_idx))
    text = config.get_text_config()
    if own := next(filter(None, map(_own, modules)), ""):
        raise ValueError(
            f"the attention of a {text.model_type} student has {own}, which HyperAttention cannot do; use "
            "train.attention: sdpa or another student"
        )
    used = [index for index in chosen if _reads_all(text, int(modules[index].layer_idx)) and _fit(modules[index])]
    return list(chosen), used


def _own(module: "nn.Module") -> str:
    """What an attention module has that `kernels.hyper_attention.huggingface` refuses in every layer; "" if nothing."""
    if getattr(module, "sinks", None) is not None:
        return "sinks"
    if getattr(module, "attn_logit_softcapping", None):
        return "attn_logit_softcapping"
    for name in ("attention_dropout", "attn_dropout", "dropout"):  # OPT's attention has it as a number `dropout`
        found = getattr(module, name, 0)
        rate = found if name == "dropout" else getattr(found, "p", found)
        if isinstance(rate, int | float) and rate:
            return f"a dropout of {rate}"
    return ""


def _fit(module: "nn.Module") -> bool:
    from kernels.hyper_attention.api import HEAD_SIZES

    sizes = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
    size = next((size for size in sizes if size), None)
    return size is None or (size in HEAD_SIZES and getattr(module, "v_head_dim", size) == size)


def _reads_all(config: "PretrainedConfig", layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer] in _FULL
    return not (getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
