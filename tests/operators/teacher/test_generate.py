"""How a prompt is tokenised and what is in the key of a call; a real engine is asked in test_real_engine."""

import json

from transformers import AutoTokenizer

from operators.teacher.config import TeacherConfig
from operators.teacher.prompt_tokens import prompt_token_ids


def test_a_prompt_has_one_beginning_and_ends_where_the_reply_begins(demo_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = prompt_token_ids(json.dumps([{"role": "user", "content": "Hello"}]), TeacherConfig(model=demo_model))
    text = tokenizer.decode(ids)
    assert text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 1


def test_where_and_how_fast_is_no_part_of_the_key() -> None:
    plain = TeacherConfig(backend="scripted", model="fluent")
    scaled = plain.model_copy(update={"replicas": (2, 9), "device": "cpu", "batch_rows": 1, "max_num_seqs": 3})
    assert plain.key_parts() == scaled.key_parts()
    assert plain.key_parts() != plain.model_copy(update={"temperature": 0.5}).key_parts()
