"""Measures the speed of a training in comparable numbers: model FLOPs by document, MFU, tokens, goodput.

Model FLOPs are those of the student's forward and backward passes, without recomputation: 6 for each weight and token
(4 for a frozen weight, which has no gradient), and 6 x heads x head size x length^2 for the causal attention of each
document and layer. Source: PaLM (arXiv:2204.02311), appendix B, with causal attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from operators.train.quantise import num_weights

# Dense bfloat16 FLOP/s from the manufacturers' data sheets; the longest matching name counts.
_PEAKS = {
    "V100": 125e12,  # float16
    "A100": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
}

# How configurations name the number of experts of a layer, and of those that a token passes through.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_OF_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a training step of one model.

    Attributes:
        per_token: FLOPs of all weights that multiply, forward and backward.
        per_square: FLOPs of attention, to be multiplied by the square of a document's length.
    """

    per_token: float
    per_square: float

    def flops(self, document_lengths: Sequence[int]) -> float:
        """FLOPs of one forward and backward pass over documents that do not attend to each other."""
        squares = sum(length * length for length in document_lengths)
        return self.per_token * sum(document_lengths) + self.per_square * squares


def model_cost(model: Any) -> ModelCost:
    """The cost of a model from its weights; the input embedding does not count, because it is only looked up.

    Of the weights of experts, the share counts that a token passes through.

    A model whose configuration has no attention heads, such as a state-space model, counts as one without attention.
    """
    text = model.config.get_text_config()
    looked_up = model.get_input_embeddings()
    tied = getattr(text, "tie_word_embeddings", False)
    skipped = set() if tied else {id(parameter) for parameter in looked_up.parameters()}
    parameters = [(name, each) for name, each in model.named_parameters() if id(each) not in skipped]
    active = _active_share(text)
    sizes = [(num_weights(each) * (active if ".experts." in name else 1), each) for name, each in parameters]
    per_token = sum(size * (6 if each.requires_grad else 4) for size, each in sizes)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return ModelCost(float(per_token), 0.0)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelCost(float(per_token), 6.0 * text.num_hidden_layers * heads * size)


def _active_share(text: Any) -> float:
    """The share of a layer's experts that a token passes through; 1 if the configuration does not say it."""
    counts = (getattr(text, name, None) for name in _EXPERTS)
    experts = next((count for count in counts if isinstance(count, int) and count), 0)
    used = next((getattr(text, name) for name in _EXPERTS_OF_TOKEN if hasattr(text, name)), 0)
    return used / experts if experts and isinstance(used, int) and 0 < used <= experts else 1.0


def peak_flops(device: str) -> float | None:
    """Peak FLOP/s of one worker's device; None if unknown, as on CPUs."""
    if not device.startswith("cuda"):
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(name: str) -> float | None:
    """Peak FLOP/s of a GPU by its driver's name; None for a MIG slice, which is only a part of a GPU."""
    words = name.replace("-", " ").split()
    found = [known for known in _PEAKS if all(word in words for word in known.split()) and "MIG" not in words]
    return _PEAKS[max(found, key=len)] if found else None
