"""Tests whether documents of one pack influence each other, by running the student's own code.

Hybrids with state-space or convolution layers carry a state from one document to the next, and learned or ALiBi
positions count over the whole pack. Without this test, both would be trained wrongly without an error.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from operators.student.encode import IGNORED
from operators.student.packed_attention import attention_in_use
from operators.student.packed_documents import Pack
from operators.student.packed_loss import load_trainable, summed_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LENGTHS = (30, 41, 25)  # tokens of three documents
_PROMPT = 10  # tokens of each without loss
_SMALL = 1 << 30  # weights of up to this many bytes are probed in float32, larger ones in bfloat16


@dataclass(frozen=True)
class PackingProbe:
    """Comparisons of the student's losses on random documents.

    Attributes:
        change: relative difference between the documents' losses alone and packed.
        moved: relative difference of one document's loss when another one changes.
        attention: the implementation that was used.
        dtype: of the weights.
    """

    change: float
    moved: float
    attention: str
    dtype: torch.dtype

    @property
    def leaks(self) -> bool:
        """Whether documents influence each other by more than rounding errors.

        Where another document changes, a document that stays apart goes through the same arithmetic, so its loss moves
        by nothing at all; a convolution of a student with fresh weights moves it by 4e-7.
        """
        change, moved = (2e-5, 2e-7) if self.dtype == torch.float32 else (2e-2, 2e-3)
        return self.change > change or self.moved > moved


def load_probed(student: str, config: "PretrainedConfig") -> Any:
    """Load the student's first layers as training does, from a folder or a hub id."""
    small = first_layers(config)
    width = getattr(config.get_text_config(), "hidden_size", 1024)
    dtype = torch.float32 if config.get_text_config().vocab_size * width * 4 < _SMALL else torch.bfloat16
    return load_trainable(student, dtype, small)


def probe_packing(model: Any, packed: bool = True) -> PackingProbe:
    """Compare the losses of a loaded student.

    Args:
        model: from `load_probed`; it is left in evaluation mode.
        packed: compare; otherwise read one document, to check that the student can be trained at all.
    """
    attention, dtype = attention_in_use(model), next(model.parameters()).dtype
    model.eval()  # dropout would make two equal documents differ
    with torch.no_grad():
        if not packed:
            documents = _documents(model, seed=0)
            summed_loss(model, _pack(documents[:1], [True]))
            return PackingProbe(0.0, 0.0, attention, dtype)
        return PackingProbe(*compare(model), attention, dtype)


def compare(model: Any) -> tuple[float, float]:
    """`change` and `moved` of a loaded model; call it without gradients."""
    documents, others = _documents(model, seed=0), _documents(model, seed=1)
    alone = [summed_loss(model, _pack([document], [True])).item() for document in documents]
    together = summed_loss(model, _pack(documents, [True] * 3)).item()
    second = [False, True, False]
    before = summed_loss(model, _pack(documents, second)).item()
    after = summed_loss(model, _pack([others[0], *documents[1:]], second)).item()
    losses = [*alone, together, before, after]
    if not all(loss == loss and abs(loss) < float("inf") for loss in losses):
        raise ValueError(f"the loss of random tokens is {losses}, not a finite number")
    # In the sum, a gain of one document could hide a loss of another, so one document is also compared by itself.
    change = max(abs(sum(alone) - together) / abs(sum(alone)), abs(alone[1] - before) / abs(alone[1]))
    return change, abs(after - before) / abs(before)


def first_layers(config: "PretrainedConfig") -> "PretrainedConfig":
    """The configuration with only the first layers: at least two, and enough to have each kind of layer once."""
    small = deepcopy(config)
    text = small.get_text_config()
    count = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ["same"] * count)
    kept = max(min(count, 2), max(kinds.index(kind) for kind in set(kinds)) + 1)
    for part in {id(part): part for part in (small, text)}.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == count and name != "architectures":
                setattr(part, name, value[:kept])
            elif name.endswith("layer_indices") and isinstance(value, list):
                setattr(part, name, [index for index in value if index < kept])
    text.num_hidden_layers = kept
    return small


def _documents(model: Any, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]


def _pack(documents: list[list[int]], learnt: list[bool]) -> Pack:
    labels = [
        [IGNORED] * _PROMPT + document[_PROMPT:] if learn else [IGNORED] * len(document)
        for document, learn in zip(documents, learnt, strict=True)
    ]
    lengths = [len(document) for document in documents]
    return Pack([*chain(*documents)], [*chain(*labels)], lengths, [0] * len(documents))
