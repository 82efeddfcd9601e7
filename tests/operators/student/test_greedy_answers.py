"""Greedy answers in left-padded batches, from a model with prescribed answers."""

import torch
from transformers import AutoModelForCausalLM

from operators.student.encode import load_tokenizer
from operators.student.greedy_answers import greedy_answers

SETTINGS = {"max_new_tokens": 8, "repetition_penalty": 1.0, "batch_rows": 3}


def test_an_answer_is_the_same_alone_and_beside_longer_prompts(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_tokenizer(tiny_model)
    prompts = [tokenizer(text).input_ids for text in ("One", "A much longer prompt than that", "Two three", "Four")]
    together = greedy_answers(model, tokenizer, prompts, **SETTINGS)
    assert together == [greedy_answers(model, tokenizer, [prompt], **SETTINGS)[0] for prompt in prompts]
    assert all(count <= 8 for _, count in together)


def test_an_answer_ends_with_the_learnt_end_of_turn_of_a_base_student(tiny_model, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_tokenizer(tiny_model)
    tokenizer.eos_token = "<|endoftext|>"  # noqa: S105 - a token, not a password
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    blue, end = tokenizer("Blue").input_ids[0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = iter([blue, blue, end, blue, blue, blue, blue, blue])
    whole = model.forward

    def forward(*args, **options):
        out = whole(*args, **options)
        out.logits = torch.nn.functional.one_hot(torch.tensor([[next(said)]]), out.logits.shape[-1]).float() * 9
        return out

    monkeypatch.setattr(model, "forward", forward)
    assert greedy_answers(model, tokenizer, [tokenizer("A colour?").input_ids], **SETTINGS) == [("BlueBlue", 2)]
