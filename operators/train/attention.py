"""HyperAttention in training: the layers that use it, and the path that its documents take."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig

from operators.student.hyper_layers import EXACT, hyper_attention_layers
from operators.train.config import TrainConfig


def count_hyper_layers(student: str, config: TrainConfig) -> int:
    """The number of layers that will use HyperAttention; 0 without it.

    Raises:
        ValueError: it is configured, but no layer can use it, or the student has a layer that rules it out.
    """
    if config.attention != "hyper_attention":
        return 0
    model = AutoConfig.from_pretrained(student, trust_remote_code=False)
    _, used = hyper_attention_layers(model, config.hyper_attention_layers)
    if not used:
        raise ValueError(
            f"train: train.attention: hyper_attention, but 0 of {model.get_text_config().num_hidden_layers} layers of "
            f"{student} can use it (they {EXACT}); use train.attention: sdpa"
        )
    return len(used)


def configured_attention(model: Any, config: TrainConfig) -> AbstractContextManager[object]:
    """A context in which the model uses the configured attention; documents of a pack stay apart in any case."""
    if config.attention == "sdpa":
        return nullcontext()
    from kernels.hyper_attention.huggingface import patched_attention

    return patched_attention(model, config.hyper_attention_config(), config.hyper_attention_layers)


def hyper_attention_routes(model: Any, config: TrainConfig, document_lengths: Iterable[Sequence[int]]) -> list[str]:
    """The path of HyperAttention for the pack with the longest document, on the model's device; it may be exact.

    Args:
        model: the student.
        config: of the training.
        document_lengths: tokens of each document, by pack.

    Returns:
        One sentence for the report; none without HyperAttention.
    """
    if config.attention != "hyper_attention":
        return []
    from kernels.hyper_attention import explain

    lengths = max(document_lengths, key=max)
    longest, packed = max(lengths), len(lengths) > 1 or config.packs_per_pass > 1
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    parameter = next(model.parameters())
    empty = torch.empty((1, 1, 1, 1), device=parameter.device, dtype=parameter.dtype)  # device and dtype matter
    q, k = (empty.expand(1, number, sum(lengths), size) for number in (heads, key_heads))
    sizes, compiled = config.hyper_attention_config(), config.compile and config.sequence_parallel == 1
    route = explain(q, k, True, config=sizes, packed=packed, longest=longest, compiled=compiled)
    return [f"HyperAttention: the longest document has {longest} tokens and takes the path {route}"]
