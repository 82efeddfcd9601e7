"""Greedy answers of a model to encoded prompts, in left-padded batches of similar length."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from operators.student.generation import stop_tokens


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repetition_penalty: float,
    batch_rows: int,
) -> list[tuple[str, int]]:
    """Answer each prompt by always taking the most likely next token.

    Args:
        model: from `load_causal_lm`.
        tokenizer: the model's.
        prompts: token ids, up to where the answer begins; none empty.
        max_new_tokens: limit of one answer.
        repetition_penalty: 1 is plain greedy decoding.
        batch_rows: answers decoded at once; this and the longest prompt bound the memory of keys and values.

    Returns:
        For each prompt the text without control tokens, stripped, and the number of its tokens before the end of turn.
    """
    stops = stop_tokens(model.generation_config.eos_token_id, tokenizer)
    padding = tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=padding if padding is not None else (stops or [0])[0],
    )
    answers = [("", 0)] * len(prompts)
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(places), batch_rows):
        group = places[start : start + batch_rows]
        for place, new_ids in zip(group, _generate(model, [prompts[place] for place in group], settings), strict=True):
            end = next((at for at, token in enumerate(new_ids) if token in stops), len(new_ids))
            answers[place] = str(tokenizer.decode(new_ids[:end], skip_special_tokens=True)).strip(), end
    return answers


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    padded = [[settings.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generated = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=settings,
    )
    new_ids: list[list[int]] = generated[:, longest:].tolist()
    return new_ids
