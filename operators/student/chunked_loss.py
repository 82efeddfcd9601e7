"""The cross entropy of a language model without all of its logits at once.

Logits are tokens x vocabulary: 32k tokens with a vocabulary of 152k would take 19 GiB in fp32, and several times that
with their gradient. Here the head reads as many tokens at a time as fit into a fixed number of bytes, and the gradient
is computed at once, so that no logit is computed twice; a soft cap on the logits is applied there too. This happens
inside the model's own forward pass. Under ZeRO-3 the head's weight exists only during that pass, so the backward pass
computes the logits again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

LOGITS_BYTES = 1 << 30
_BYTES_A_LOGIT = 16  # 2 for the logit and 2 for its gradient in half precision, 4 each for three steps in fp32
_SCALED_ROWS = 8192
_COMPILED = "loss_and_gradient"  # attribute of a model
_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # names in the configurations of Gemma 2 to 4 and others
_NO_CAP = 2.0**60  # so large that x / cap, tanh and times cap give x itself, bit by bit, in every number format used
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def return_loss(model: Any) -> None:
    """Add an argument `targets` to `model.forward`: with it, the forward pass returns their loss instead of logits.

    `targets` are int64 [P], for the positions that `logits_to_keep` names, of a batch of one row; the loss is the sum
    of their cross entropy in nats, an fp32 scalar. Without `targets` nothing changes.
    """
    plain, head = model.forward, model.get_output_embeddings()
    text = model.config.get_text_config()
    capped_by = next((name for name in _CAPS if getattr(text, name, None)), "")
    cap = float(getattr(text, capped_by)) if capped_by else 0.0

    def forward(*args: Any, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return plain(*args, **options)
        rows = rows_at_a_time(text.vocab_size)
        if type(head) is not nn.Linear or (len(targets) <= rows and _COMPILED not in vars(model)):
            return _summed(plain(*args, **options).logits[0], targets)
        # The model applies a factor on its logits to the head's input instead; a cap must wait for the logits.
        with _passing_on(head), _without_cap(text, capped_by):
            hidden = plain(*args, **options).logits[0]
        if hasattr(head.weight, "ds_id"):
            parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            losses = [checkpoint(_head_loss, head, part, wanted, cap, use_reentrant=False) for part, wanted in parts]
            return torch.stack(losses).sum()
        of_part = vars(model).get(_COMPILED, loss_and_gradient)
        in_parts_of: Callable[..., Tensor] = _LossInParts.apply
        return in_parts_of(hidden, head.weight, head.bias, targets, rows, partial(of_part, cap=cap))

    model.forward = forward


def compile_loss(model: Any, compiler: Compiler) -> None:
    """Make a model with `return_loss` use `compiler(loss_and_gradient)`."""
    vars(model)[_COMPILED] = compiler(loss_and_gradient)


def rows_at_a_time(vocabulary: int) -> int:
    """The number of positions whose logits, with everything their loss needs, take at most `LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (vocabulary * _BYTES_A_LOGIT))


def loss_and_gradient(logits: Tensor, targets: Tensor, cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """The summed cross entropy of logits [P, V] in fp32, and its gradient in the logits' dtype.

    Args:
        logits: of the head.
        targets: int64 [P].
        cap: if above 0, the loss is that of cap * tanh(logits / cap), with the slope 1 - tanh(logits / cap)^2.
    """
    exact = _capped(logits.float(), cap)
    log_sum = exact.logsumexp(-1, keepdim=True)
    loss = (log_sum - exact.gather(1, targets[:, None])).sum()
    shares = (exact - log_sum).exp()
    wanted = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = torch.where(wanted, shares - 1, shares)
    if cap:
        gradient.addcmul_(gradient, exact.square_(), value=-1 / cap**2)
    return loss, gradient.to(logits.dtype)


class _LossInParts(torch.autograd.Function):
    """The head's loss; the forward pass computes the gradients, and the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        of_part: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        loss = torch.zeros((), device=hidden.device)
        gradients = [
            torch.zeros_like(tensor) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), wanted, strict=True)
        ]
        for_hidden, for_weight, for_bias = gradients
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            part_loss, gradient = of_part(linear(hidden[part], weight, bias), targets[part])
            loss += part_loss
            if for_hidden is not None:
                torch.mm(gradient, weight, out=for_hidden[part])
            if for_weight is not None:
                for_weight.addmm_(gradient.T, hidden[part])
            if for_bias is not None:
                for_bias += gradient.sum(0)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        return (*[None if each is None else _scaled(each, scales[0]) for each in ctx.saved_tensors], None, None, None)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The product in fp32, rounded once, without an fp32 copy of the whole gradient."""
    scaled = torch.empty_like(gradient)
    for part, into in zip(torch.split(gradient, _SCALED_ROWS), torch.split(scaled, _SCALED_ROWS), strict=True):
        into.copy_(part.float() * scale)
    return scaled


def _head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, cap: float) -> Tensor:
    return _summed(_capped(head(hidden).float(), cap), targets)


def _capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap if cap else logits


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")


@contextmanager
def _without_cap(text: PretrainedConfig, name: str) -> Iterator[None]:
    """Inside, the model does not cap what its head returns; some models cap it even if the configuration says None."""
    settings = vars(text)
    changed = {name: settings[name]} if name else {}
    settings.update(dict.fromkeys(changed, _NO_CAP))
    try:
        yield
    finally:
        settings.update(changed)


@contextmanager
def _passing_on(head: nn.Module) -> Iterator[None]:
    """Inside, the head returns its input unchanged."""
    vars(head)["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del vars(head)["forward"]
