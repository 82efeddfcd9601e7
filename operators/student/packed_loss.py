"""Loads a student for training, and computes its loss on one pack of documents."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from operators.student.chunked_loss import return_loss
from operators.student.encode import IGNORED
from operators.student.exact_attention import exact_attention
from operators.student.packed_attention import on_device, set_documents, use_packed_attention
from operators.student.packed_documents import Pack, slice_of


def load_trainable(student: str, dtype: torch.dtype, config: PretrainedConfig | None = None, **options: Any) -> Any:
    """Load a student for training, with exact attention that keeps the documents of a pack apart.

    Args:
        student: folder or hub id.
        dtype: of the weights.
        config: used instead of the student's own, for example with fewer layers.
        options: more arguments of `from_pretrained`, for example to quantise the weights.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: its forward pass cannot leave out logits that no loss needs.
    """
    model = AutoModelForCausalLM.from_pretrained(
        student,
        config=config,
        dtype=dtype,
        attn_implementation=exact_attention(student),
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"train: {type(model).__name__} of student {student} takes no logits_to_keep; use another")
    use_packed_attention(model)
    return_loss(model)
    return model.train()


def summed_loss(model: Any, pack: Pack, device: str = "cpu", place: int = 0, count: int = 1) -> Tensor:
    """Sum of the cross entropy over the supervised tokens of a pack, in nats; fp32 scalar, 0 for a dummy.

    Only positions that predict a supervised token pass through the head. There is no attention mask: lengths separate
    the documents, or position ids, which restart at 0.

    Args:
        model: the student, or its engine.
        pack: the whole pack.
        device: of the model.
        place: of the slice that this worker reads, if `count` workers share the pack. The sum is then over the tokens
            that this slice predicts; the last of them is the first of the next slice.
        count: of slices of one length; it must divide the number of tokens, and above 1 the attention must exchange
            what the slices need of each other (`operators.train.sequence_parallel`).
    """
    padding = len(pack.input_ids) - sum(pack.document_lengths)
    lengths = [*pack.document_lengths, *([padding] if padding else [])]
    set_documents(lengths)
    span = slice_of(len(pack.input_ids), place, count)
    # Everything is decided on the host, because reading a result from a GPU would wait for all its queued work.
    targets = torch.tensor([*pack.labels[1:], IGNORED][span])
    predicting = (targets != IGNORED).nonzero()[:, 0]
    nothing = not len(predicting)
    if nothing:  # use one position, so that the forward and backward passes run, with a loss of zero
        predicting, targets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None, span]
    input_ids, positions, kept, wanted = (
        on_device(tensor, device)
        for tensor in (torch.tensor([pack.input_ids[span]]), positions, predicting, targets[predicting])
    )
    options = {"position_ids": positions, "use_cache": False, "logits_to_keep": kept}
    loss: Tensor = model(input_ids=input_ids, targets=wanted, **options)
    return loss * 0 if nothing else loss
