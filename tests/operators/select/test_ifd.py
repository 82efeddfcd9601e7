import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators.select.ifd import (
    Pair,
    Score,
    ScoreConfig,
    StudentScorer,
    _labelled,
    guess_request,
    ifd_turn,
    score_of,
    target_spans,
)
from operators.student.encode import load_tokenizer
from operators.student.nll import like_length_groups

PAIRS = [
    Pair("Name a colour.", "", "Blue is a colour that many people like."),
    Pair("Translate to French.", "Good morning", "Bonjour"),
    Pair("Say it twice: hello hello", "hello hello", "hello hello hello hello"),
    Pair("Write three lines about rain.", None, "Rain falls.\nRain stops.\n\nThe street shines — naïve, 雨."),
]


def independent_nll(model: Any, context: list[int], target: list[int]) -> float:
    """The mean loss of target[1:] in nats for one row, in float64, from the log-probability of one token at a time."""
    ids = torch.tensor([context + target])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    first = len(context) + 1
    return -sum(log_probs[place - 1, ids[0, place]].item() for place in range(first, ids.shape[1])) / (len(target) - 1)


def independent_scores(folder: str, pairs: list[Pair]) -> tuple[list[float], list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()

    def ratio(asked: str, target: str) -> float:
        # SmolLM2's template, written out by hand.
        prompt = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        )
        context = tokenizer(prompt).input_ids
        ids = tokenizer(target).input_ids
        return math.exp(independent_nll(model, context, ids) - independent_nll(model, [], ids))

    asked = [f"{pair.instruction}\n\n{pair.input}" if pair.input else pair.instruction for pair in pairs]
    return (
        [ratio(text, pair.response) for text, pair in zip(asked, pairs, strict=True)],
        [ratio(guess_request(pair.response), text) for text, pair in zip(asked, pairs, strict=True)],
    )


def assert_scores_match(folder: str, pairs: list[Pair], config: ScoreConfig) -> None:
    scorer = StudentScorer(folder, config)
    ifd, rifd = independent_scores(folder, pairs)
    assert [score.ratio for score in scorer.ifd(pairs)] == pytest.approx(ifd, rel=1e-4)
    assert [score.ratio for score in scorer.reverse_ifd(pairs)] == pytest.approx(rifd, rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000], ids=["one by one", "some batches", "one batch"])
def test_batched_scores_equal_an_independent_computation(tiny_model: str, batch_tokens: int) -> None:
    assert_scores_match(tiny_model, PAIRS, ScoreConfig(batch_tokens=batch_tokens))


@pytest.mark.slow
def test_scores_of_real_records_by_a_real_model_equal_an_independent_computation(demo_model: str, alpaca: Path) -> None:
    records = [record for record in json.loads(alpaca.read_text())[:40] if len(record["output"]) < 400][:4]
    pairs = [Pair(record["instruction"], record["input"], record["output"]) for record in records]
    assert_scores_match(demo_model, pairs, ScoreConfig(batch_tokens=1024))


def test_groups_hold_every_example_once_within_the_limit_and_pad_little() -> None:
    lengths = [60, 10] * 40 + [n * 37 % 301 + 1 for n in range(500)]
    groups = list(like_length_groups(lengths, batch_tokens=2000))
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    padded = [len(group) * max(lengths[place] for place in group) for group in groups]
    assert max(padded) <= 2000
    assert sum(padded) < 1.1 * sum(lengths)
    assert list(like_length_groups([60, 10] * 40, batch_tokens=4096)) == [[*range(1, 80, 2)], [*range(0, 80, 2)]]


def test_a_fitting_answer_is_easier_than_a_foreign_one(demo_model: str) -> None:
    capital = Pair("What is the capital of France?", "", "The capital of France is Paris.")
    foreign = Pair("How do I boil an egg?", "", "The capital of France is Paris.")
    scorer = StudentScorer(demo_model, ScoreConfig())
    for score in (scorer.ifd, scorer.reverse_ifd):
        fitting_ratio, foreign_ratio = (score.ratio for score in score([capital, foreign]))
        assert fitting_ratio is not None
        assert foreign_ratio is not None
        assert fitting_ratio < foreign_ratio


def test_context_and_target_are_told_apart_by_position_even_when_the_texts_are_the_same(tiny_model: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    spans = target_spans(tokenizer, ("echo echo echo", "echo echo echo"), 100)
    target = tokenizer("echo echo echo").input_ids
    assert spans.given[-len(target) :] == target == spans.alone
    for ids in (spans.given, spans.alone):
        labels = _labelled(ids, spans.num_scored).labels
        assert labels[-len(target) :] == [-100, *target[1:]]
        assert set(labels[: -len(target)]) <= {-100}


def test_both_means_are_over_the_same_tokens_when_the_tokenizer_writes_a_beginning_of_sequence(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    plain = target_spans(tokenizer, ("Name it.", "Blue as the sky"), 100)
    original = type(tokenizer).__call__

    def with_bos(self: Any, text: str, **options: Any) -> Any:
        encoded = original(self, text, **options)
        if options.get("add_special_tokens") is False:
            return encoded
        encoded["input_ids"] = [1, *encoded["input_ids"]]
        return encoded

    monkeypatch.setattr(type(tokenizer), "__call__", with_bos)
    spans = target_spans(tokenizer, ("Name it.", "Blue as the sky"), 100)
    assert spans.alone == [1, *plain.alone]
    assert spans.num_scored == plain.num_scored == len(plain.alone) - 1


@pytest.mark.parametrize(
    ("asked", "target", "reason"),
    [
        ("Name it.", "", "empty"),
        ("Name it.", " \n", "empty"),
        ("", "Blue", "empty"),
        ("Name it. " * 100, "Blue as the sky", "over_max_tokens"),
        ("Name it.", "Blue<|im_end|> and more", "special_tokens"),
    ],
)
def test_a_pair_that_cannot_be_scored_gets_none_and_a_reason(
    tiny_model: str, asked: str, target: str, reason: str
) -> None:
    score = StudentScorer(tiny_model, ScoreConfig(max_tokens=100)).ifd([Pair(asked, "", target), PAIRS[0]])
    assert (score[0].ratio, score[0].perplexity, score[0].reason) == (None, None, reason)
    assert score[1].ratio is not None, "the pair beside it is scored all the same"


def test_an_answer_of_one_token_is_scored_by_that_token(tiny_model: str) -> None:
    """The expected IFD is p(token | beginning of text) / p(token | instruction), computed from the raw logits."""
    tokenizer, model = load_tokenizer(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    spans = target_spans(tokenizer, ("Is the sky blue?", "Yes"), 100)
    assert spans.num_scored == 1
    assert spans.alone == [tokenizer.bos_token_id, *tokenizer("Yes").input_ids]
    nll = []
    for ids in (spans.given, spans.alone):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -2].double()
        nll.append(-torch.log_softmax(logits, -1)[ids[-1]].item())
    [score] = StudentScorer(tiny_model, ScoreConfig()).ifd([Pair("Is the sky blue?", "", "Yes")])
    assert score.ratio == pytest.approx(math.exp(nll[0] - nll[1]), rel=1e-4)


def test_without_a_token_that_begins_texts_an_answer_of_one_token_has_no_score(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    monkeypatch.setattr(type(tokenizer), "bos_token_id", property(lambda self: None), raising=False)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", property(lambda self: None), raising=False)
    assert target_spans(tokenizer, ("Is the sky blue?", "Yes"), 100).reason == "too_short"


def test_the_dialogue_before_is_part_of_the_context(tiny_model: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    turns = json.dumps([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, Ann."}])
    plain, after = (
        target_spans(tokenizer, ifd_turn(Pair("Name it.", "", "Blue as the sky", before)), 200)
        for before in ("", turns)
    )
    assert len(after.given) > len(plain.given)
    assert "Hello, Ann." in tokenizer.decode(after.given)
    assert after.alone == plain.alone


@pytest.mark.parametrize(
    ("given", "alone"),
    [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf), (1e6, 1.0)],
)
def test_a_likelihood_that_is_not_finite_is_no_score(given: float, alone: float) -> None:
    assert score_of(given, alone, 4) == Score(reason="not_finite")


def test_ratio_and_perplexity_are_of_means() -> None:
    score = score_of(6.0, 9.0, 3)
    assert score.ratio == pytest.approx(math.exp(2.0) / math.exp(3.0))
    assert score.perplexity == pytest.approx(math.exp(2.0))


def test_a_student_with_broken_weights_scores_nothing(tiny_model: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    scores = StudentScorer(str(tmp_path), ScoreConfig()).ifd(PAIRS[:2])
    assert [score.reason for score in scores] == ["not_finite", "not_finite"]


def test_a_given_template_changes_the_context_and_not_the_target(tiny_model: str, own_template: str) -> None:
    turn = ("Name a colour.", "Blue and green.")
    [own], [given] = (StudentScorer(tiny_model, ScoreConfig(), text).prepare([turn]) for text in ("", own_template))
    assert own.given != given.given
    assert own.given[-own.num_scored :] == given.given[-given.num_scored :]
