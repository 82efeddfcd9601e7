"""Chat templates from practice: how each renders an answer, and which are refused."""

import pytest

from operators.student.chat_format import chat_format
from operators.student.encode import IGNORED, EncodingError, encode_example, load_tokenizer, require_template

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{% for m in messages %}{% if m.role == 'assistant' %}"
ELSE = "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
OPEN = "{{ '<|im_start|>assistant\n' }}"
GENERATION = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
BARE_GENERATION = "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"


@pytest.fixture
def tokenizer(demo_model):
    return load_tokenizer(demo_model)


def learnt(tokenizer, *texts):
    return tokenizer.decode([token for token in encode_example(tokenizer, *texts).labels if token != IGNORED])


@pytest.mark.parametrize(
    ("template", "reason", "words"),
    [
        ("{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}", "no_end_of_turn", "learn to stop"),
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}" + PROMPT,
         "no_end_of_turn", "learn to stop"),
        (TURN + OPEN + BARE_GENERATION + ELSE + PROMPT, "no_end_of_turn", "inside its generation marks"),
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.content %}{{ c.text }}{% endfor %}"
         "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT, "no_loss", "writes no response"),
        ("{{ messages | length }}" + CHATML + PROMPT, "chat_template", "not a prefix"),
        ("{{ raise_exception('this template needs tools') }}", "chat_template", "this template needs tools"),
        ("{% for m in messages %", "chat_template", "refuses"),
    ],
    ids=["no_control_token", "no_end", "end_outside_the_marks", "content_in_parts", "no_prefix", "raises", "syntax"],
)  # fmt: skip
def test_a_template_that_teaches_no_end_or_no_answer_is_refused(tokenizer, template, reason, words):
    tokenizer.chat_template = template
    with pytest.raises(EncodingError, match=words) as error:
        require_template(tokenizer)
    assert error.value.reason == reason
    assert "student" in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        CHATML + PROMPT,
        TURN + OPEN + GENERATION + ELSE + PROMPT,
        TURN + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}" + ELSE + PROMPT,
        CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}" + PROMPT,
        TURN + "{{ '<|im_start|>assistant\n' + (m.content | trim) + '<|im_end|>\n' }}" + ELSE + PROMPT,
    ],
    ids=["chatml", "marks", "empty_think_block", "end_of_text_after_the_dialogue", "trimmed"],
)
def test_labels_are_the_answer_and_one_end_token(tokenizer, template):
    tokenizer.chat_template = template
    require_template(tokenizer)
    assert learnt(tokenizer, "Name a colour.", "", "Blue, of course.") == "Blue, of course.<|im_end|>"
    assert chat_format(tokenizer).end_token == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_default_of_several_named_templates_is_used(tokenizer, tmp_path):
    tokenizer.chat_template = {"default": CHATML + PROMPT, "tool_use": "{{ raise_exception('not this one') }}"}
    assert learnt(tokenizer, "Name a colour.", "", "Blue.") == "Blue.<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert learnt(again, "Name a colour.", "", "Blue.") == "Blue.<|im_end|>"
    tokenizer.chat_template = {"tool_use": CHATML}
    with pytest.raises(ValueError, match="only templates named tool_use"):
        require_template(tokenizer)


def test_the_template_is_probed_once(tokenizer, monkeypatch):
    form = chat_format(tokenizer)
    assert form.by_pieces
    rendered = []
    whole = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda self, *a, **k: rendered.append(a) or whole(self, *a, **k)
    )
    for number in range(10):
        encode_example(tokenizer, f"Say {number}.", "", str(number))
    assert len(rendered) <= 21  # for each example the dialogue and its prompt, and once the bare dialogue
