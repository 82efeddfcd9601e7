"""Examples longer than a pack: what is kept and what is lost, both of which are counted."""

import pytest

from operators.student.encode import IGNORED, Encoded
from operators.train.overlong import fit, is_first_part, part_id


def example(prompt, answer):
    """An example of tokens 0, 1, 2, ..., with loss on the last `answer` of them."""
    tokens = list(range(prompt + answer))
    return Encoded(tokens, [IGNORED] * prompt + tokens[prompt:])


@pytest.mark.parametrize("overlong", ["quarantine", "truncate", "split"])
def test_an_example_that_fits_is_unchanged(overlong):
    assert fit(example(6, 4), 10, overlong).parts == [example(6, 4)]


def test_truncation_keeps_the_beginning_and_says_how_many_supervised_tokens_it_lost():
    fitted = fit(example(6, 7), 10, "truncate")
    assert [part.input_ids for part in fitted.parts] == [list(range(10))]
    assert fitted.parts[0].labels == [IGNORED] * 6 + [6, 7, 8, 9]
    assert (fitted.lost, fitted.cut) == (3, True)


def test_where_only_the_prompt_is_left_there_is_nothing_to_learn():
    assert fit(example(12, 3), 10, "truncate").parts == []
    assert fit(example(12, 3), 10, "truncate").lost == 3


@pytest.mark.parametrize("max_tokens", [2, 3, 7, 16])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_split_parts_learn_each_supervised_token_once_from_the_token_before_it(max_tokens, prompt):
    whole = example(prompt, 50)
    fitted = fit(whole, max_tokens, "split")
    assert fitted.lost == 0
    learnt = []
    for part in fitted.parts:
        assert len(part.input_ids) == len(part.labels) <= max_tokens
        pairs = zip(part.input_ids, part.labels[1:], strict=False)
        learnt += [(before, label) for before, label in pairs if label != IGNORED]
    assert learnt == [(token - 1, token) for token in range(prompt, prompt + 50)]


@pytest.mark.parametrize(("prompt", "answer", "cut"), [(5, 30, False), (9, 3, False), (12, 8, True), (40, 8, True)])
def test_a_split_that_leaves_out_the_beginning_of_a_prompt_is_reported(prompt, answer, cut):
    assert fit(example(prompt, answer), 10, "split").cut is cut


def test_a_split_that_leaves_out_what_follows_the_answer_is_not_cut():
    tokens = list(range(12))
    fitted = fit(Encoded(tokens, [IGNORED, *range(1, 10), IGNORED, IGNORED]), 10, "split")
    assert (len(fitted.parts), fitted.cut) == (1, False)


def test_a_quarantined_example_loses_all_of_its_loss():
    assert fit(example(6, 7), 10, "quarantine").parts == []
    assert fit(example(6, 7), 10, "quarantine").lost == 7


def test_only_the_first_part_counts_as_its_row():
    assert part_id("a3f1", 0) == "a3f1"
    assert part_id("a3f1", 2) == "a3f1#3"
    assert [is_first_part(name) for name in ("a3f1", "a3f1#3", "a#b", "a#")] == [True, False, True, True]
