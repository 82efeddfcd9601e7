"""Chat markup in data is broken up, and nothing else is touched."""

import random
from types import SimpleNamespace

import pytest

from operators.chat_markup import control_tokens, escape, is_marker, special_tokens_of

NONE: frozenset[str] = frozenset()
LLAMA_2 = frozenset({"<s>", "</s>", "<unk>"})


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("<|im_end|>", "<| im_end |>"),
        ("<|start_header_id|>system<|end_header_id|>", "<| start_header_id |>system<| end_header_id |>"),
        ("[INST] hi [/INST]", "[ INST ] hi [/ INST ]"),
        ("<start_of_turn>model", "< start_of_turn >model"),
        ("<<SYS>>obey<</SYS>>", "<< SYS >>obey<</ SYS >>"),
        ("<｜end▁of▁sentence｜>", "<｜ end▁of▁sentence ｜>"),
        ("＜｜User｜＞", "＜｜ User ｜＞"),
        ("<|turn>user<turn|>", "<| turn >user< turn |>"),
        ("</think>", "</ think >"),
        ("<extra_id_1>", "< extra_id_1 >"),
        ("<|a|><|b|>", "<| a |><| b |>"),
    ],
)
def test_the_markers_of_the_common_families_are_broken(text: str, broken: str) -> None:
    assert escape(text, NONE) == broken


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<p>Old price: <s>10</s> <b>8</b></p>",
        "if a <b and c> d: x[INSTANCE] = [inst]",
        "xs |> map f <| ys",
        "p <|> q",
        "a <|-|> b",
        "a | b || c <||> d",
        "<html><head><title>[1]</title></head>",
        "see [INSTRUCTIONS] and <thinking>",
        "vector<int> v; std::cout << SYS >> 2;",
    ],
)
def test_ordinary_text_and_html_stay_byte_identical(text: str) -> None:
    assert escape(text, NONE) == text


def test_strikethrough_is_a_marker_only_where_the_model_says_so() -> None:
    assert escape("<s>x</s>", NONE) == "<s>x</s>"
    assert escape("<s>x</s>", LLAMA_2) == "< s >x</ s >"


def test_a_delimiter_of_a_prompt_can_be_given() -> None:
    assert escape("[New Answer] no", frozenset({"[New Answer]"})) == "[ New Answer ] no"


@pytest.mark.parametrize("token", ["", " ", "word", "!", "<>", "\n"])
def test_a_token_without_brackets_is_refused(token: str) -> None:
    assert not is_marker(token)
    with pytest.raises(ValueError, match="not a name in brackets"):
        escape("<", frozenset({token}))


def test_special_tokens_of_the_demo_model_are_markers(demo_model: str) -> None:
    tokens = special_tokens_of(demo_model)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"} <= tokens
    assert all(is_marker(token) for token in tokens)


def spliced(random_state: random.Random, markers: list[str]) -> str:
    """A text with markers inserted into each other at random places, with pieces of ordinary text between them."""
    text = random_state.choice(["", "a", " ", "<", "|", "<|", "é\n"])
    for _ in range(random_state.randint(1, 5)):
        place = random_state.randint(0, len(text))
        text = text[:place] + random_state.choice(markers) + text[place:]
        if random_state.random() < 0.3:
            cut = random_state.randint(0, len(text))
            text = text[:cut] + random_state.choice([" ", "|", ">", "<", "", "[", "_"]) + text[cut:]
    return text


def test_no_spliced_text_encodes_to_a_special_token(demo_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    special_tokens = special_tokens_of(demo_model)
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    markers = [*sorted(special_tokens), "[INST]", "<start_of_turn>"]
    random_state = random.Random(0)
    texts = ["<|im_<|im_end|>end|>", "<|<|im_end|>|im_end|>", *(spliced(random_state, markers) for _ in range(3000))]
    dangerous = 0
    for text in texts:
        safe = escape(text, special_tokens)
        dangerous += bool(special_ids & set(tokenizer(text, add_special_tokens=False).input_ids))
        assert not special_ids & set(tokenizer(safe, add_special_tokens=False).input_ids), repr(text)
        assert escape(safe, special_tokens) == safe, repr(text)
        assert safe.replace(" ", "") == text.replace(" ", ""), repr(text)
    assert dangerous > 1000  # the texts would be control tokens if nothing were done


def test_tokens_that_overlap_and_contain_spaces_are_all_broken() -> None:
    tokens = frozenset({"<s>", "< s >", "[a]", "]b[", "<a]"})
    random_state = random.Random(1)
    for _ in range(2000):
        text = spliced(random_state, sorted(tokens))
        safe = escape(text, tokens)
        assert not [token for token in tokens if token in safe], (text, safe)
        assert escape(safe, tokens) == safe


def test_any_run_of_brackets_is_handled_and_stable() -> None:
    random_state = random.Random(2)
    for _ in range(20_000):
        text = "".join(random_state.choices("<>|[]_/ -a1｜＞\n", k=random_state.randint(1, 12)))
        safe = escape(text, LLAMA_2)
        assert escape(safe, LLAMA_2) == safe, repr(text)


def test_a_pad_token_that_is_bare_punctuation_or_a_word_is_not_a_control_token() -> None:
    added = {0: ("!", True), 1: ("<s>", True), 2: ("</s>", True), 3: ("pad", True), 4: ("<note>", False)}
    tokenizer = SimpleNamespace(
        added_tokens_decoder={
            n: SimpleNamespace(content=text, special=special) for n, (text, special) in added.items()
        },
        all_special_ids=[0, 5],
        all_special_tokens=["!", "<|end|>"],
    )
    assert control_tokens(tokenizer) == {1: "<s>", 2: "</s>", 5: "<|end|>"}
