"""What a student does to its embeddings on their way to the first layer, measured on its own code.

NEFTune adds noise to the output of the embedding module. Some families multiply that output by a constant afterwards
(Granite, Falcon-H1, RecurrentGemma), and with it the noise: without a division by this constant, the first layer of a
Granite student would see a noise of norm 34.7 instead of 2.89. This code has no list of families.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8
_CHANGE = 0.1  # size of the change, relative to the embeddings; small, so that a norm of the embeddings shows
_EXACT = 1e-3  # a larger relative difference between elements is no rounding error


class _ReachedError(Exception):
    """Ends the forward pass before the first layer, and carries what that layer would read."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True)
class EmbeddingGain:
    """The way from the embedding module to the first layer.

    Attributes:
        factor: by which a change of the module's output arrives at the first layer; 1 for most families. To six digits,
            so that all workers have the same number.
        uniform: every element is multiplied by this factor, whatever the text; else it is a mean.
        inside: by which the module itself multiplies its weights (sqrt(hidden size) in Gemma); 1 for most families.
    """

    factor: float = 1.0
    uniform: bool = True
    inside: float = 1.0

    @property
    def problem(self) -> str:
        """Why the noise cannot have the norm alpha / sqrt(3) at the first layer; "" if it can."""
        if self.uniform:
            return ""
        return (
            "between its embeddings and its first layer the student does more than multiply by a constant (noise "
            f"arrives {self.factor:.3g} times as large on average), so the noise cannot have the norm alpha / sqrt(3) "
            f"there; set train.neftune_alpha: 0, or take another student"
        )

    @property
    def note(self) -> str:
        """What was done about the factors, or what they mean; "" if they are 1."""
        whole = self.factor * self.inside
        if not self.uniform or abs(whole - 1) < 0.01:
            return ""
        done = "the noise has" if self.factor == 1 else "the noise is divided by this factor, so that it has"
        return (
            f"the student multiplies its embeddings by {whole:.6g}; {done} the norm alpha / sqrt(3) at the first layer,"
            f" and beside the embeddings it is {whole:.3g} times weaker than without the factor; raise "
            "train.neftune_alpha if it should have more effect"
        )


@torch.no_grad()
def embedding_gain(model: Any) -> EmbeddingGain:
    """Measure the factors of a loaded student, also of one whose weights ZeRO-3 has divided; the layers do not run.

    Every worker must call this if the weights are divided.

    Raises:
        ValueError: the student has no list of layers that its forward pass calls.
    """
    embedding, training = model.get_input_embeddings(), model.training
    with _whole(model):
        ids = torch.arange(_TOKENS, device=embedding.weight.device)[None]
        model.eval()  # dropout would differ between the passes
        try:
            found = _measured(model, embedding, ids)
        finally:
            model.train(training)
        return found


def _measured(model: Any, embedding: nn.Module, ids: Tensor) -> EmbeddingGain:
    embedded = embedding(ids)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(embedded.shape, generator=generator).to(embedded.device)
    scale = float(embedded.float().square().mean().sqrt())
    for dtype in (torch.float32, embedded.dtype):  # fp32 shows the exact factor; a norm in bf16 takes only bf16
        before = embedded.to(dtype)
        after = (embedded.float() + _CHANGE * (scale or 1.0) * change).to(dtype)
        try:
            arrived = [_at_first_layer(model, embedding, ids, output).float() for output in (before, after)]
        except RuntimeError:
            if dtype == embedded.dtype:
                raise
            continue
        sent, moved = (after.float() - before.float()).flatten(), (arrived[1] - arrived[0]).flatten()
        return EmbeddingGain(*_factor(sent, moved, _EXACT if dtype == torch.float32 else 0.05), _inside(embedding, ids))
    raise AssertionError


def _factor(sent: Tensor, moved: Tensor, limit: float) -> tuple[float, bool]:
    """The factor from the change that was sent to the one that arrived, and whether each element has it."""
    if sent.shape != moved.shape:
        return float(moved.norm() / sent.norm()), False
    factor = float(f"{float(sent @ moved / (sent @ sent)):.6g}")
    if factor <= 0 or float((moved - factor * sent).norm()) > limit * float(moved.norm()):
        return float(f"{float(moved.norm() / sent.norm()):.6g}"), False
    return factor, True


def _inside(embedding: nn.Module, ids: Tensor) -> float:
    """The ratio of the module's output to its rows of weights; 1 if they have other sizes."""
    output, weight = embedding(ids)[0].float(), getattr(embedding, "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != output.shape[1]:
        return 1.0
    rows = weight[ids[0].to(weight.device)].float().norm()
    return float(f"{float(output.norm() / rows):.4g}") if rows > 0 else 1.0


def _at_first_layer(model: Any, embedding: nn.Module, ids: Tensor, output: Tensor) -> Tensor:
    """What the first layer reads if the embedding module returns `output`."""

    def replace(*_: Any) -> Tensor:
        return output

    def stop(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        raise _ReachedError(arguments[0] if arguments else options["hidden_states"])

    handles = [embedding.register_forward_hook(replace)]
    handles += [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in _first_layers(model)]
    try:
        model(input_ids=ids, position_ids=torch.arange(_TOKENS, device=ids.device)[None], use_cache=False)
    except _ReachedError as reached:
        return reached.hidden
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"student.model: {type(model).__name__} calls no list of layers, so no layer is its first")


def _first_layers(model: Any) -> list[nn.Module]:
    """The first of each list of as many modules as the student has layers; that of another tower is not called."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return [layers[0] for layers in lists]


@contextmanager
def _whole(model: Any) -> Iterator[None]:
    """All weights outside the layers, gathered if ZeRO-3 has divided them."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    import deepspeed

    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    inside = {id(parameter) for layers in lists for parameter in layers.parameters()}
    head = model.get_output_embeddings()
    inside |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    kept = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # tied weights are both
    outside = [one for one in model.parameters() if id(one) not in inside or id(one) in kept]
    with deepspeed.zero.GatheredParameters(outside):
        yield
