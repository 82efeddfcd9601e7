"""A reward model on a real, tiny sequence-classification model of random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from operators.columns import INSTRUCTION_REFLECTED
from operators.select.config import SelectConfig
from operators.select.ifd import Pair, Prepared, Score, ScoreConfig, ifd_turn
from operators.select.reward import RewardScorer, encode, examine_reward_model, reward_tokenizer
from operators.select.score_store import KNOWN, REWARDS, Scorer, _decide, _prepare, _ScoringActor
from operators.select.select import select_instructions

TEXTS = [
    ("Name a colour.", "", "Blue."),
    ("Count to five.", "slowly", "one two three four five " * 6),
    ("Say something.", "", "Well."),
]


@pytest.fixture(scope="module")
def reward_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(tmp_path_factory.mktemp("models") / "reward", tiny_model, num_labels=1)


def made(folder: Path, tokenizer: str, num_labels: int) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        num_labels=num_labels,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def alone(folder: str, turns: list[dict[str, str]]) -> float:
    """The reward from transformers itself, one dialogue at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    with torch.inference_mode():
        return float(model(torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_rewards_are_the_models_own_however_texts_are_batched(reward_model: str, batch_tokens: int) -> None:
    scorer = RewardScorer(reward_model, ScoreConfig(max_tokens=200, batch_tokens=batch_tokens))
    before = [{"role": "system", "content": "Be brief."}]
    turns = [ifd_turn(Pair(*text)) for text in TEXTS] + [ifd_turn(Pair(*TEXTS[0], json.dumps(before)))]
    scores = scorer.score(turns)
    asked = [("Name a colour.", "Blue."), ("Count to five.\n\nslowly", TEXTS[1][2]), ("Say something.", "Well.")]
    said = [[{"role": "user", "content": one}, {"role": "assistant", "content": two}] for one, two in asked]
    expected = [alone(reward_model, dialogue) for dialogue in [*said, [*before, *said[0]]]]
    assert [score.reward for score in scores] == pytest.approx(expected, abs=1e-5)
    assert len({round(reward, 4) for reward in expected}) == 4, "the model tells these texts apart"
    assert {score.reason for score in scores} == {""}


def test_an_unreadable_text_has_a_reason_and_does_not_affect_others(reward_model: str) -> None:
    scorer = RewardScorer(reward_model, ScoreConfig(max_tokens=60))
    turns = [("Hi", " "), ("Name a colour.", "Blue."), ("Go on.", "and on " * 100)]
    empty, scored, long = scorer.score(turns)
    assert (empty, long) == (Score(reason="empty"), Score(reason="over_max_tokens"))
    assert scored.reward is not None
    assert scorer.score([]) == []


def test_a_model_without_a_template_reads_request_and_answer_as_a_pair(reward_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = None
    before = json.dumps([{"role": "user", "content": "Hello"}])
    found = encode(tokenizer, ("Name a colour.", "Blue.", before), 100)
    assert found == Prepared(tokenizer("Hello\n\nName a colour.", "Blue.").input_ids)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    assert encode(tokenizer, ("Name a colour.", "Blue."), 100).reason == "chat_template"


def test_an_encoder_is_told_which_text_is_the_answer_and_how_long_both_may_be(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "name", "colour", "blue"]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, model_max_length=30)
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    turns = [("name colour", "blue"), ("name", "blue blue"), ("name", "blue " * 28)]
    with torch.inference_mode():
        expected = [float(model(**tokenizer(*turn, return_tensors="pt")).logits[0, 0]) for turn in turns[:2]]
    *scored, long = RewardScorer(str(tmp_path), ScoreConfig()).score(turns)
    assert [score.reward for score in scored] == pytest.approx(expected, abs=1e-5)
    assert long == Score(reason="over_max_tokens")


def test_only_a_classifier_with_one_label_is_a_reward_model(reward_model: str, tiny_model: str, tmp_path: Path) -> None:
    assert list(examine_reward_model(reward_model)) == []
    [of_two] = examine_reward_model(made(tmp_path / "two", tiny_model, num_labels=2))
    assert "LlamaForSequenceClassification with 2 labels" in str(of_two)
    [causal] = examine_reward_model(tiny_model)
    assert str(causal).startswith("select.reward_model: ")
    assert "LlamaForCausalLM" in str(causal)


def test_a_reward_model_that_would_score_nothing_is_refused(reward_model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_model, tmp_path / "model"))

    def only(template: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        reward_tokenizer.cache_clear()
        [finding] = examine_reward_model(str(folder))
        assert finding.fatal
        return str(finding)

    assert "cannot write a dialogue (TemplateError: no)" in only("{{ raise_exception('no') }}")
    assert "cannot write a dialogue (ZeroDivisionError" in only("{{ 1 / 0 }}")
    assert encode(reward_tokenizer(str(folder)), ("Hi", "Ho"), 99) == Prepared(reason="chat_template")
    assert "leaves out the answer" in only("{{ messages[0].content }}")


def test_the_files_of_a_reward_model_are_checked(reward_model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    [half] = examine_reward_model(str(folder))
    assert "model.safetensors cannot be read" in str(half)
    (folder / "config.json").write_text("{")
    assert "has no usable config.json" in [str(finding) for finding in examine_reward_model(str(folder))][-1]


class Rows:
    """A data set of one block, with the methods that the selection uses."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def columns(self) -> list[str]:
        names: list[str] = self.table.column_names
        return names


def test_the_rewrite_of_higher_reward_is_selected_and_its_score_is_stored(
    reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("Name a colour.", "Blue."), ("Say something.", "Well, one thing.")]
    scores = RewardScorer(reward_model, ScoreConfig()).score(pairs)
    texts = {score.reward: pair for score, pair in zip(scores, pairs, strict=True)}
    old, new = sorted(scores, key=lambda score: score.reward or 0)

    def row(name: str, first: Score, second: Score) -> dict[str, Any]:
        (instruction, response), (better, answer) = texts[first.reward], texts[second.reward]
        row = {"row_id": name, "instruction": instruction, "input": "", "response": response, "outcome": ""}
        row |= {"better_instruction": better, "better_instruction_response": answer}
        return row | {"instruction_reflection": "parsed", "escaped": False}

    def here(rows: Rows, asked: Any, decide: Any, scorer: Scorer, kind: str) -> pa.Table:
        assert kind == REWARDS
        judge = RewardScorer(scorer.reward_model, scorer.config)
        unknown = rows.table.append_column(KNOWN, pa.nulls(rows.table.num_rows, pa.string()))
        prepared = _prepare(unknown, asked, judge, scorer.config)
        return _decide(_ScoringActor(judge, str(tmp_path))(prepared), decide, scorer.config)

    monkeypatch.setattr("operators.select.select.map_with_scores", here)
    table = pa.Table.from_pylist([row("better", old, new), row("worse", new, old)], schema=INSTRUCTION_REFLECTED)
    config = SelectConfig(policy="reward", reward_model=reward_model)
    scorer = Scorer("no student is loaded", ScoreConfig(), str(tmp_path), reward_model)
    chosen: Any = select_instructions(Rows(table), config, scorer)  # type: ignore[arg-type]
    found = {one["row_id"]: one for one in chosen.to_pylist()}
    assert found["better"]["selected_instruction"] == found["better"]["better_instruction"]
    assert found["worse"]["selected_instruction"] == found["worse"]["instruction"]
    assert found["better"]["ifd_better_instruction"] == pytest.approx(new.reward, abs=1e-6)
    [stored] = tmp_path.glob("*.parquet")
    rewards = sorted(pq.read_table(stored)["reward"].to_pylist())  # each row has its own records
    assert rewards == pytest.approx([old.reward] * 2 + [new.reward] * 2, abs=1e-6)


def test_the_policy_needs_a_model_and_older_work_stays_valid_without_one() -> None:
    with pytest.raises(ValidationError, match="reward needs reward_model"):
        SelectConfig(policy="reward")
    assert "reward_model" not in SelectConfig().identity()
    assert SelectConfig(policy="reward", reward_model="a").identity()["reward_model"] == "a"
