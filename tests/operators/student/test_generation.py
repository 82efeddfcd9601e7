"""The tokens at which answers stop, and generation configs that can be saved."""

import pytest
from transformers import GenerationConfig

from operators.student.encode import load_tokenizer
from operators.student.generation import exportable, stop_tokens

END_OF_TURN, END_OF_TEXT = 2, 0  # <|im_end|> and <|endoftext|> of the demo model


@pytest.fixture
def tokenizer(demo_model):
    return load_tokenizer(demo_model)


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, [END_OF_TURN]),
        (END_OF_TURN, [END_OF_TURN]),
        (END_OF_TEXT, [END_OF_TURN, END_OF_TEXT]),
        ([END_OF_TEXT, END_OF_TURN], [END_OF_TURN, END_OF_TEXT]),
    ],
)
def test_the_learnt_end_of_turn_always_stops_an_answer(tokenizer, configured, expected):
    assert stop_tokens(configured, tokenizer) == expected


def test_a_base_tokenizer_s_own_end_stops_too(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"  # noqa: S105 - a token, not a password
    assert stop_tokens(None, tokenizer) == [END_OF_TURN, END_OF_TEXT]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({}, ""),
        ({"do_sample": True, "temperature": 0.7}, ""),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, "do_sample: true"),
        ({"pad_token_id": -1, "bos_token_id": 1}, "nothing of it but its token ids"),
    ],
)
def test_an_exported_generation_config_can_be_saved(tokenizer, tmp_path, values, changed):
    settings = GenerationConfig(eos_token_id=END_OF_TEXT, **values)
    exported, how = exportable(settings, tokenizer)
    assert how == changed
    exported.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [END_OF_TURN, END_OF_TEXT]
    assert settings.eos_token_id == END_OF_TEXT, "the student's own is left as it is"
