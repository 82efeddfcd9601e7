import pytest

from operators.student.encode import IGNORED, EncodingError, encode_example, load_tokenizer, require_template, user_text


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


def test_encoding_is_the_template_s_own(tokenizer):
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


def test_a_prompt_that_is_no_prefix_names_the_student(demo_model):
    odd = load_tokenizer(demo_model)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(ValueError, match=f"student {demo_model}"):
        require_template(odd)


def test_an_example_without_loss_is_an_error(demo_model):
    mute = load_tokenizer(demo_model)
    mute.chat_template = "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}"
    with pytest.raises(EncodingError) as error:
        encode_example(mute, "Hi", "", "Hello")
    assert error.value.reason == "no_loss"


def test_a_model_without_template_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no single chat template"):
        load_tokenizer(str(tmp_path))
