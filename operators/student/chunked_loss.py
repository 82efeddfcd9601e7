"""The cross entropy of a language model without all of its logits at once.

Logits are tokens x vocabulary: 32k tokens of a 152k vocabulary would be 19 GiB in fp32, several times over with their
gradient. Here the head reads as many tokens at a time as fit a fixed number of bytes, and reads them again in the
backward pass. It happens inside the model's own forward pass: under ZeRO-3 the head's weight is there only then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

SUMMED = "summed_cross_entropy"
LOGITS_BYTES = 1 << 30
_BYTES_A_LOGIT = 14  # two of the logit in half precision, and four each of its copy, log-softmax and gradient in fp32


def return_loss(model: Any) -> None:
    """Give `model.forward` an argument `targets`: with it, the forward pass returns their loss instead of logits.

    `targets` are int64 [P], for the positions that `logits_to_keep` names, of a batch of one row; the loss is the sum
    of their cross entropy in nats, an fp32 scalar. Without `targets` nothing changes.
    """
    plain, head = model.forward, model.get_output_embeddings()
    # A factor on the logits is a factor on what the head reads; a soft cap is not, so those models are left alone.
    text = model.config.get_text_config()
    linear = isinstance(head, nn.Linear) and not getattr(text, "final_logit_softcapping", None)

    def forward(*args: Any, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return plain(*args, **options)
        rows, summed = rows_at_a_time(text.vocab_size), vars(model).get(SUMMED, summed_cross_entropy)
        if not linear or len(targets) <= rows:
            return summed(plain(*args, **options).logits[0], targets)
        with _passing_on(head):
            hidden = plain(*args, **options).logits[0]
        parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        losses = [checkpoint(_head_loss, head, summed, part, wanted, use_reentrant=False) for part, wanted in parts]
        return torch.stack(losses).sum()

    model.forward = forward


def rows_at_a_time(vocabulary: int) -> int:
    """Positions whose logits, with all that their loss needs, take at most `LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (vocabulary * _BYTES_A_LOGIT))


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats over all positions, fp32; a model's attribute of the name `SUMMED` takes its place, compiled."""
    return cross_entropy(logits.float(), targets, reduction="sum")


def _head_loss(head: nn.Module, summed: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return summed(head(hidden), targets)


@contextmanager
def _passing_on(head: nn.Module) -> Iterator[None]:
    """Inside, the head returns what it is given."""
    vars(head)["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del vars(head)["forward"]
