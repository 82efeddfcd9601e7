"""How fast a training is, in figures that can be compared: model FLOPs by document, MFU, tokens, goodput.

Model FLOPs are what the forward and backward passes of the student need, without recomputation: 6 for each weight and
token (4 for a weight that is frozen, which has no gradient of its own), and 6 x heads x head size x length^2 for the
causal attention of each document and layer. Source: PaLM (arXiv:2204.02311), appendix B, with causal attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Dense bfloat16 FLOP/s by the makers' data sheets; the longest name that fits counts.
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


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a training step of one model.

    Attributes:
        per_token: of all weights that multiply, forward and backward.
        per_square: of attention, for each token squared of a document.
    """

    per_token: float
    per_square: float

    def flops(self, document_lengths: Sequence[int]) -> float:
        """Of one forward and backward pass over documents that do not see each other."""
        squares = sum(length * length for length in document_lengths)
        return self.per_token * sum(document_lengths) + self.per_square * squares


def model_cost(model: Any) -> ModelCost:
    """The cost of a model by its weights; those of the input embedding are looked up and multiply nothing.

    A model whose configuration names no attention heads, such as a state-space model, is taken to have no attention.
    """
    text = model.config.get_text_config()
    looked_up = model.get_input_embeddings()
    tied = getattr(text, "tie_word_embeddings", False)
    skipped = set() if tied else {id(parameter) for parameter in looked_up.parameters()}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in skipped]
    sizes = [(int(getattr(each, "ds_numel", each.numel())), each.requires_grad) for each in parameters]
    per_token = sum(size * (6 if trained else 4) for size, trained in sizes)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return ModelCost(float(per_token), 0.0)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelCost(float(per_token), 6.0 * text.num_hidden_layers * heads * size)


def peak_flops(device: str) -> float | None:
    """Of one worker's device, None where it is not known, as on CPUs."""
    if not device.startswith("cuda"):
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(name: str) -> float | None:
    """Of a GPU by the name that its driver gives it; None of a MIG slice, which is a part of one."""
    words = name.replace("-", " ").split()
    found = [known for known in _PEAKS if all(word in words for word in known.split()) and "MIG" not in words]
    return _PEAKS[max(found, key=len)] if found else None
