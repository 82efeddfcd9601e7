"""Negative log likelihood of the labelled tokens of encoded examples, in padded batches of similar length.

Right padding under a causal mask changes no score, because a token sees only earlier tokens. Losses are computed in
float32 and summed in float64, for weights of any type.
"""

from collections.abc import Iterator, Sequence
from inspect import signature

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from operators.student.encode import IGNORED, Encoded
from operators.student.exact_attention import exact_attention
from operators.student.pool import StudentPoolConfig

WORTH_A_PASS = 256  # tokens; with 512, padding costs more than additional passes on a CPU


def load_causal_lm(model: str, pool: StudentPoolConfig) -> PreTrainedModel:
    """Load a model for inference: exact attention, no dropout, and the same number format on CPUs and GPUs.

    Args:
        model: folder or hub id, as `resolve_model` returns it.
        pool: says which format, whether there is a GPU, and how many threads the process may use.
    """
    on_gpu = pool.gpus_per_actor > 0
    if not on_gpu:
        torch.set_num_threads(pool.threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16 if pool.precision == "bf16" else torch.float32,
        attn_implementation=exact_attention(model),
        trust_remote_code=False,
        use_safetensors=True,
    )
    return loaded.to("cuda" if on_gpu else "cpu").eval()


def sum_nll(model: PreTrainedModel, examples: Sequence[Encoded], batch_tokens: int) -> list[float]:
    """Negative log likelihood in nats of each example's labelled tokens, summed.

    Args:
        model: from `load_causal_lm`.
        examples: none empty; the label of the first token is not predicted and must be -100.
        batch_tokens: largest number of tokens of one forward pass, with padding; a longer example has its own pass.

    Returns:
        One float64 sum for each example, in their order; NaN or infinite if the model's logits are.
    """
    sums = [0.0] * len(examples)
    for group in like_length_groups([len(example.input_ids) for example in examples], batch_tokens):
        for place, nll in zip(group, _group_nll(model, [examples[place] for place in group]), strict=True):
            sums[place] = nll
    return sums


def like_length_groups(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `lengths`, shortest first, in groups of at most `batch_tokens` tokens with padding.

    Padding costs as much as other tokens, so a group that is large enough for a pass also ends where padding would be
    more than a tenth of it.
    """
    group: list[int] = []
    real = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(group) + 1) * lengths[place]
        wasteful = real >= WORTH_A_PASS and padded - real - lengths[place] > padded / 10
        if group and (padded > batch_tokens or wasteful):
            yield group
            group, real = [], 0
        group.append(place)
        real += lengths[place]
    if group:
        yield group


@torch.inference_mode()
def _group_nll(model: PreTrainedModel, examples: list[Encoded]) -> list[float]:
    longest = max(len(example.input_ids) for example in examples)
    # Any token can be the padding, and no mask is needed, because padding comes after all scored tokens.
    input_ids = _pad([example.input_ids for example in examples], longest, 0, model.device)
    targets = _pad([example.labels[1:] for example in examples], longest - 1, IGNORED, model.device)
    # The head is as large as the vocabulary, so it reads only positions before a labelled token of some example.
    places = (targets != IGNORED).any(0).nonzero()[:, 0]
    keep = {"logits_to_keep": places} if "logits_to_keep" in signature(model.forward).parameters else {}
    logits = model(input_ids=input_ids, use_cache=False, **keep).logits
    logits = logits if keep else logits[:, places]
    return [_labelled_nll(row_logits, row) for row_logits, row in zip(logits, targets[:, places], strict=True)]


def _labelled_nll(row_logits: Tensor, row_targets: Tensor) -> float:
    # One row at a time, because a float32 copy of the whole batch's logits might not fit into memory.
    labelled = row_targets != IGNORED
    nll = F.cross_entropy(row_logits[labelled].float(), row_targets[labelled], reduction="none")
    return float(nll.double().sum())


def _pad(rows: list[list[int]], length: int, value: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)
