import json

import pytest

from operators.student.encode import IGNORED, EncodingError, encode_example, load_tokenizer, user_text


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return load_tokenizer(demo_model)


def learnt(encoded):
    return [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]


def test_input_is_a_paragraph_of_its_own():
    assert user_text("Sum up.", "A text.") == "Sum up.\n\nA text."
    assert user_text("Sum up.", "") == user_text("Sum up.", None) == "Sum up."


def test_loss_is_on_response_and_end_of_turn_only(tokenizer):
    encoded = encode_example(tokenizer, "Say hello.", "to Ada", "Hello, Ada!")
    assert tokenizer.decode(learnt(encoded)) == "Hello, Ada!<|im_end|>"
    assert tokenizer.decode(encoded.input_ids).endswith("Hello, Ada!<|im_end|>\n")
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_encoding_equals_that_of_the_template(tokenizer):
    turns = [{"role": "user", "content": "Say hello.\n\nto Ada"}, {"role": "assistant", "content": "Hello!"}]
    rendered = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert encode_example(tokenizer, "Say hello.", "to Ada", "Hello!").input_ids == rendered


def test_generation_marks_are_used_where_the_template_has_them(demo_model):
    marked = load_tokenizer(demo_model)
    marked.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    encoded = encode_example(marked, "Say hello.", "", "Hello!")
    assert marked.decode(learnt(encoded)) == "Hello!<|im_end|>"


@pytest.mark.parametrize(
    "texts",
    [("Hi<|im_end|>", "", "Hello"), ("Hi", "<|im_start|>system", "Hello"), ("Hi", "", "a<|endoftext|>b")],
    ids=["instruction", "input", "response"],
)
def test_control_tokens_in_a_text_are_refused(tokenizer, texts):
    with pytest.raises(EncodingError, match="control tokens") as error:
        encode_example(tokenizer, *texts)
    assert error.value.reason == "special_tokens"


def test_a_text_with_the_characters_of_an_ordinary_pad_token_is_kept(demo_model):
    shouting = load_tokenizer(demo_model)
    shouting.pad_token = "!"  # noqa: S105 - a token, not a password
    encoded = encode_example(shouting, "Say hello!", "", "Hello! Hello!")
    assert shouting.decode(learnt(encoded)) == "Hello! Hello!<|im_end|>"


def test_leading_indentation_of_an_answer_is_learnt(tokenizer):
    # In one piece "\n" and the blanks would be one token, which belongs neither to the prompt nor to the answer.
    encoded = encode_example(tokenizer, "Go on.", "", "    return x")
    assert tokenizer.decode(learnt(encoded)) == "    return x<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Go on."}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[: len(prompt)] == prompt


BEFORE = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a city."},
    {"role": "assistant", "content": "Paris."},
]
AFTER = [{"role": "user", "content": "And a river?"}, {"role": "assistant", "content": "The Seine."}]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("last", "Berlin.<|im_end|>The Seine.<|im_end|>"),  # a recycled answer is always learnt
        ("recycled", "Berlin.<|im_end|>"),
        ("all", "Paris.<|im_end|>Berlin.<|im_end|>The Seine.<|im_end|>"),
    ],
)
def test_a_dialogue_is_rendered_whole_and_learnt_where_it_is_asked(tokenizer, loss_on, expected):
    texts = ("Another?", "", "Berlin.", json.dumps(BEFORE), json.dumps(AFTER))
    encoded = encode_example(tokenizer, *texts, loss_on=loss_on)
    turns = [*BEFORE, {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Berlin."}, *AFTER]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(learnt(encoded)) == expected


def test_the_recycled_answer_before_the_use_of_a_tool_is_learnt(tokenizer):
    """`source.turns: last` picks the last answer that directly follows a question."""
    call = [
        ("user", "Of Spain?"),
        ("assistant", '{"name": "look"}'),
        ("tool", "Madrid"),
        ("assistant", "It is Madrid."),
    ]
    after = json.dumps([{"role": role, "content": content} for role, content in call])
    for loss_on, expected in {
        "last": "Paris.<|im_end|>It is Madrid.<|im_end|>",
        "recycled": "Paris.<|im_end|>",
    }.items():
        encoded = encode_example(tokenizer, "Capital of France?", "", "Paris.", "", after, loss_on=loss_on)
        assert tokenizer.decode(learnt(encoded)) == expected


@pytest.mark.parametrize("loss_on", ["last", "recycled", "all"])
def test_a_pair_alone_is_learnt_alike_whatever_is_asked(tokenizer, loss_on):
    before = json.dumps([*BEFORE[:2], {"role": "assistant", "content": ""}])
    encoded = encode_example(tokenizer, "Another?", "", "Berlin.", before, "", loss_on=loss_on)
    assert tokenizer.decode(learnt(encoded)) == "Berlin.<|im_end|>"


def test_control_tokens_in_an_earlier_turn_are_refused(tokenizer):
    before = json.dumps([{"role": "system", "content": "<|im_start|>user"}])
    with pytest.raises(EncodingError, match="control tokens") as error:
        encode_example(tokenizer, "Hi", "", "Hello", before)
    assert error.value.reason == "special_tokens"


def test_turns_that_the_template_refuses_have_a_reason(demo_model):
    strict = load_tokenizer(demo_model)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts here') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encode_example(strict, "Hi", "", "Hello")
    with pytest.raises(EncodingError, match="no system prompts here") as error:
        encode_example(strict, "Hi", "", "Hello", json.dumps([{"role": "system", "content": "Be short."}]))
    assert error.value.reason == "chat_template"


def test_an_example_without_an_answer_is_an_error(tokenizer):
    with pytest.raises(EncodingError) as error:
        encode_example(tokenizer, "Hi", "", "")
    assert error.value.reason == "no_loss"


def test_a_given_template_replaces_that_of_the_model(demo_model, own_template, tmp_path):
    tokenizer = load_tokenizer(demo_model, own_template)
    text = tokenizer.decode(encode_example(tokenizer, "Name a colour.", "", "Blue.").input_ids)
    assert text == "<|im_start|>user:Name a colour.<|im_end|><|im_start|>assistant:Blue.<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == own_template
    assert load_tokenizer(demo_model).chat_template != own_template
