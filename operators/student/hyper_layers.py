"""Finds the layers of a student that can use HyperAttention; the others stay exact."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FULL = ("full_attention", "attention")


def hyper_attention_layers(config: "PretrainedConfig", layers: str | Sequence[int]) -> tuple[list[int], list[int]]:
    """The attention layers that `layers` means, and those of them that may read every earlier token.

    The others have a sliding or chunked window, so they get a mask, and with a mask attention is exact. This allocates
    no weights.

    Args:
        config: the student's.
        layers: all, last:n, first:n, even, odd, or indices.

    Raises:
        ValueError: the student has no attention layer, or none with such an index, or its attention has sinks or caps.
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
    own = "sinks" if any(getattr(module, "sinks", None) is not None for module in modules) else ""
    own = own or ("attn_logit_softcapping" if getattr(text, "attn_logit_softcapping", None) else "")
    if own:
        raise ValueError(
            f"the attention of a {text.model_type} student has {own}, which HyperAttention cannot do; use "
            "train.attention: sdpa or another student"
        )
    return list(chosen), [index for index in chosen if _reads_all(text, int(modules[index].layer_idx))]


def _reads_all(config: "PretrainedConfig", layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer] in _FULL
    return not (getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
