"""Whether several workers can share a pack: each reads a slice of its tokens, and only attention connects the slices.

DeepSpeed Ulysses (arXiv:2309.14509) divides the heads of attention over the workers, and knows no other way from one
slice to another. The checks here need a student's configuration only, and do not import torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY = "train.sequence_parallel"


def unfit_heads(config: "PretrainedConfig", workers: int) -> str:
    """Why the heads of a student cannot be divided over so many workers, with value, limit and cure; "" if they can."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        return f"{workers} workers share a pack, but the student has no heads of attention to divide; set it to 1"
    fitting = [
        size for size in range(1, heads + 1) if heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)
    ]
    if workers in fitting:
        return ""
    return (
        f"{workers} workers cannot divide the {heads} heads of the student's attention and its {key_heads} heads of "
        f"keys; set it to one of {', '.join(map(str, fitting))}"
    )


def smallest_window(config: "PretrainedConfig") -> int | None:
    """Tokens of the shortest sliding or chunked window of a layer; None if every layer reads all earlier tokens."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return None
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def unfit_window(config: "PretrainedConfig", longest: int, hyper_attention: bool) -> str:
    """Why the windows of a student do not fit documents of up to `longest` tokens; "" if they do or there are none."""
    window = smallest_window(config)
    if window is None or (window >= longest and not hyper_attention):
        return ""
    if hyper_attention:
        return f"a window of {window} tokens beside HyperAttention; use train.attention: sdpa, or set it to 1"
    return (
        f"a layer reads only {window} tokens, and documents may have {longest}; lower pack.max_tokens to {window}, or "
        "set it to 1"
    )
