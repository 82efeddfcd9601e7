"""Compiles the student's layers with torch.compile: norms, rotary positions and activations become a few kernels.

One layer is compiled, for all layers and lengths, as they run the same code. Attention is not compiled, because each
pack has other documents. The cross entropy is compiled too: it then reads the logits once, instead of making several
copies of them in fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from operators.student.chunked_loss import compile_loss


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor") -> int:
    """Let the model's layers and its loss be compiled when they are first called; returns the number of layers.

    Args:
        model: the student, with its adapters.
        backend: of torch.compile.

    Raises:
        ValueError: the model does not name its layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"train: train.compile: {type(model).__name__} does not name its layers; set train.compile to false"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    compile_loss(model, partial(torch.compile, dynamic=True, backend=backend))
    return len(layers)
