"""Checks that need the text alone, in languages with and without spaces between words."""

import pytest

from operators.reflect.text_checks import breaks_off, echoes, is_prompts_words, repetition, says_the_same


def test_repetition_is_a_share_of_runs() -> None:
    assert repetition("one two three four " * 3) == 0  # too short to judge
    assert repetition(" ".join(str(n) for n in range(200))) == 0
    assert repetition("one two three four " * 50) > 0.9
    assert repetition("我们喜欢在河边散步。" * 30) > 0.9
    assert repetition("川は山から海へ流れる。" * 30) > 0.9
    assert repetition("แม่น้ำไหลลงทะเล" * 30) > 0.9


def test_plain_chinese_repeats_little() -> None:
    text = (
        "长江发源于青藏高原的唐古拉山脉，流经十一个省市，最后在上海注入东海。它全长六千三百多公里，是亚洲最长的河流。"
        "两岸有许多城市，例如重庆、武汉和南京。春天的时候，山上的雪开始融化，水位慢慢升高；到了夏天，暴雨常常带来洪水。"
    )
    assert repetition(text) < 0.05


@pytest.mark.parametrize(
    ("answer", "asked", "expected"),
    [
        ("the river", "Describe the River.", True),
        ("长江", "请介绍长江。", True),
        ("长江很长", "请介绍长江。", False),
        ("ทะเล", "แม่น้ำไหลลงทะเล", True),
        ("a sea", "Describe the River.", False),
    ],
)
def test_echoes(answer: str, asked: str, expected: bool) -> None:
    assert echoes(answer, asked) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("它全长六千三百多公里，是亚洲最长的河流，并且它的两岸有许多城市，例如", True),
        ("它全长六千三百多公里，是亚洲最长的河流。", False),
        ("北京", False),
        ("แม่น้ำไหลลงทะเล", False),
        ("It rises in the Alps and flows through three countries before it", True),
    ],
)
def test_breaking_off(text: str, expected: bool) -> None:
    assert breaks_off(text) is expected


def test_punctuation_of_prose_says_nothing_and_signs_of_code_do() -> None:
    assert says_the_same("Hello, world!", "hello world")
    assert not says_the_same("a && b", "a || b")
    assert not says_the_same("!ready", "ready")
    assert not says_the_same("<b>x</b>", "<i>x</i>")


def test_prompt_words_need_a_noun_of_the_prompt() -> None:
    assert is_prompts_words("New instruction")
    assert is_prompts_words("Here is the better answer")
    assert not is_prompts_words("A good one")
    assert not is_prompts_words("42")
