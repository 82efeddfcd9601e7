"""Whether a loaded student can read a pack in slices: nothing but attention may carry anything between tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from operators.student.packed_attention import (
    NAME,
    PerHeadError,
    refuse_per_head,
    replaced_attention,
    set_documents,
)

_TOKENS = 8
_OF_OTHER_HEADS = ("summary", "classifier")  # keys of heads that a language model does not have


def has_dropout(model: Any) -> bool:
    """Whether a training pass drops anything at random."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    named = vars(model.config.get_text_config())
    names = [name for name in named if "dropout" in name and not name.startswith(_OF_OTHER_HEADS)]
    return modules or any(isinstance(named[name], float) and named[name] > 0 for name in names)


def unfit_model(model: Any) -> Iterator[str]:
    """Why a loaded student cannot read slices: dropout, its own attention, or a second way between tokens."""
    if has_dropout(model):
        yield "the student has dropout, which each worker would draw anew; set it to 0 in its config.json, or this to 1"
    if model.config.get_text_config()._attn_implementation != NAME:
        yield "the student does not use transformers' attention interface; set it to 1"
        return
    try:
        mixes = mixes_tokens(model)
    except PerHeadError as error:
        yield f"{error}; set it to 1"
        return
    if mixes:
        yield (
            "a token influences another one without attention (by a convolution or a state), so slices would be read "
            "wrongly; set it to 1"
        )


@torch.no_grad()
def mixes_tokens(model: Any) -> bool:
    """Whether the last token's logits depend on earlier tokens even if attention returns zeros.

    Raises:
        PerHeadError: attention gets values for single heads.
    """
    training = model.training
    ids = torch.arange(_TOKENS)[None]
    other = torch.cat([ids[:, :-1] + _TOKENS, ids[:, -1:]], 1)
    set_documents([_TOKENS])
    options = {"position_ids": torch.arange(_TOKENS)[None], "use_cache": False, "logits_to_keep": 1}
    with replaced_attention(NAME, _zeros, lambda *_, **__: None):
        one, two = (model.eval()(input_ids=tokens, **options).logits.float() for tokens in (ids, other))
    model.train(training)
    limit = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2  # experts round in another order
    return float((one - two).abs().max()) > limit * float(one.abs().max())


def _zeros(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    refuse_per_head(module, options)
    batch, heads, tokens, _size = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1]), None
