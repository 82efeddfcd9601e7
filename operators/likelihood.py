"""How likely a language model finds the labelled tokens of encoded examples, in padded batches of like length.

Right padding under a causal mask changes no score: a token sees only what stands before it. Losses are taken in
float32 and summed in float64, whatever the type of the weights.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from operators.encode import IGNORED, Encoded
from operators.student_pool import StudentPoolConfig


def load_causal_lm(model: str, pool: StudentPoolConfig) -> PreTrainedModel:
    """Load a model for reading: bfloat16 on a GPU, float32 on CPUs, SDPA attention, no dropout.

    Args:
        model: folder or hub id, as `resolve_model` returns it.
        pool: says whether there is a GPU, and how many threads the process may use.
    """
    on_gpu = pool.gpus_per_actor > 0
    if not on_gpu:
        torch.set_num_threads(pool.threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
    )
    return loaded.to("cuda" if on_gpu else "cpu").eval()


def longest_context(model: Any, max_tokens: int) -> int:
    """The configured limit, or the model's own number of positions where that is smaller."""
    return min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)


def sum_nll(model: PreTrainedModel, examples: Sequence[Encoded], batch_tokens: int) -> list[float]:
    """Negative log likelihood in nats of each example's labelled tokens, summed.

    Args:
        model: from `load_causal_lm`.
        examples: none empty; the label of the first token is not predicted and must be -100.
        batch_tokens: padded tokens of one forward pass; a longer example has a pass to itself.

    Returns:
        One float64 sum for each example, in their order; NaN or infinite where the model's logits are.
    """
    sums = [0.0] * len(examples)
    for group in like_length_groups([len(example.input_ids) for example in examples], batch_tokens):
        for place, nll in zip(group, _group_nll(model, [examples[place] for place in group]), strict=True):
            sums[place] = nll
    return sums


def like_length_groups(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of `lengths`, shortest first, in groups of at most `batch_tokens` once padded to their longest."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[place] > batch_tokens:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


@torch.inference_mode()
def _group_nll(model: PreTrainedModel, examples: list[Encoded]) -> list[float]:
    longest = max(len(example.input_ids) for example in examples)
    # Any token does as padding: it lies after all that is scored.
    input_ids = _pad([example.input_ids for example in examples], longest, 0, model.device)
    labels = _pad([example.labels for example in examples], longest, IGNORED, model.device)
    lengths = torch.tensor([len(example.input_ids) for example in examples], device=model.device)
    mask = torch.arange(longest, device=model.device)[None] < lengths[:, None]
    logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits
    return [_labelled_nll(row_logits, row_labels) for row_logits, row_labels in zip(logits, labels, strict=True)]


def _labelled_nll(row_logits: Tensor, row_labels: Tensor) -> float:
    # One row at a time: a float32 copy of the whole batch's logits is what would not fit.
    labelled = row_labels[1:] != IGNORED
    nll = F.cross_entropy(row_logits[:-1][labelled].float(), row_labels[1:][labelled], reduction="none")
    return float(nll.double().sum())


def _pad(rows: list[list[int]], length: int, value: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)
