"""Runs of words are the same for near-duplicates, contamination and repetition, in any script."""

import numpy as np
import pytest

from operators.ngrams import run_hashes, runs, words


def test_words_have_neither_case_nor_punctuation() -> None:
    assert words("The cat -- SAT down!") == ["the", "cat", "sat", "down"]
    assert words("x = a_1 + 2") == ["x", "a_1", "2"]
    assert words("?! ...") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", 6),  # Chinese
        ("\u6771\u4eac\u30bf\u30ef\u30fc\u306f", 6),  # Japanese: two Han, three Katakana, one Hiragana
        ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", 6),  # Thai, vowel signs included
        ("GPT-4\u662f\u6a21\u578b v2", 6),  # mixed: gpt, 4, three Han, v2
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", 2),  # Korean has spaces
        ("caf\u00e9 na\u00efve", 2),
    ],
)
def test_scripts_without_spaces_have_one_word_per_character(text: str, count: int) -> None:
    assert len(words(text)) == count


def test_a_short_text_is_one_run_and_no_words_are_none() -> None:
    assert runs(["a", "b", "c"], 2) == ["a b", "b c"]
    assert runs(["a"], 2) == ["a"]
    assert runs([], 2) == []


@pytest.mark.parametrize("size", [1, 2, 8])
def test_two_hashes_are_equal_exactly_where_the_runs_are(size: int) -> None:
    text = "the cat sat on the mat and the cat sat on the mat with the dog of a man who sat on the cat"
    hashes, found = run_hashes(text, size), runs(words(text), size)
    assert len(hashes) == len(found)
    assert len(set(hashes.tolist())) == len(set(found))
    assert all((hashes[a] == hashes[b]) == (found[a] == found[b]) for a in range(len(found)) for b in range(len(found)))


def test_hashes_see_order_and_words_only() -> None:
    assert np.array_equal(run_hashes("The cat -- SAT down!", 2), run_hashes("the cat sat down", 2))
    assert run_hashes("a b", 2) != run_hashes("b a", 2)
    assert len(run_hashes("cat", 2)) == 1
    assert len(run_hashes("?!", 2)) == 0
    assert run_hashes("\ud83d", 2).size == 0  # half an emoji is not a word
