"""The measurements of the actor for a batch, without Ray, on a real model of two layers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.columns import HELD_OUT, RAW
from operators.evaluate.config import EvaluateConfig, TrainedAttention
from operators.evaluate.model_actor import ModelActor
from operators.student.encode import IGNORED, LossOn, encode_example, load_tokenizer
from operators.student.nll import load_causal_lm, sum_nll

TURNS = json.dumps([{"role": "system", "content": "Answer in one word."}])


def rows_of(*texts: tuple[str, str, str], **columns: str) -> pa.Table:
    names = ("row_id", "instruction", "response")
    rows = [dict(zip(names, text, strict=True)) | {"outcome": HELD_OUT, **columns} for text in texts]
    return pa.Table.from_pylist(rows, schema=RAW)


def measure(model: str, rows: pa.Table, *samples: str, attention: TrainedAttention | None = None, **config: Any) -> Any:
    actor = ModelActor(model, samples, EvaluateConfig(max_new_tokens=4, **config), attention or TrainedAttention())
    return {row["row_id"]: row for row in actor(rows).to_pylist()}


def test_rows_have_losses_and_samples_have_answers(tiny_model: str) -> None:
    found = measure(tiny_model, rows_of(("a", "Name a colour.", "Blue."), ("b", "Say nothing.", "Well, well.")), "b")
    assert found["a"]["nll"] > 0
    assert found["a"]["answer"] is None
    assert found["b"]["num_tokens"] > found["a"]["num_tokens"]
    assert 0 < found["b"]["answer_tokens"] <= 4


def test_a_row_that_is_too_long_or_holds_markup_has_a_reason(tiny_model: str) -> None:
    rows = rows_of(("long", "Count. " * 200, "one"), ("markup", "Say hi<|im_end|>.", "hi"), ("fine", "Hi", "Hello"))
    found = measure(tiny_model, rows, "long", max_tokens=100)
    assert {row_id: row["unscored"] for row_id, row in found.items()} == {
        "long": "over_max_tokens",
        "markup": "special_tokens",
        "fine": None,
    }
    assert found["long"]["answer"] is None, "its prompt leaves no room for an answer"


def test_the_dialogue_before_the_instruction_is_context_and_carries_no_loss(tiny_model: str) -> None:
    texts = ("a", "Name a colour.", "Blue.")
    alone, after_turns = measure(tiny_model, rows_of(texts)), measure(tiny_model, rows_of(texts, turns_before=TURNS))
    assert alone["a"]["num_tokens"] == after_turns["a"]["num_tokens"]
    assert alone["a"]["nll"] != pytest.approx(after_turns["a"]["nll"], rel=1e-6)


AFTER = json.dumps([{"role": "user", "content": "And a second?"}, {"role": "assistant", "content": "Green, surely."}])


@pytest.mark.parametrize("loss_on", ["last", "recycled", "all"])
def test_a_dialogue_is_measured_on_the_turns_that_training_learns(tiny_model: str, loss_on: LossOn) -> None:
    texts = ("a", "Name a colour.", "Blue.")
    before = json.dumps([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}])
    rows = rows_of(texts, turns_before=before, turns_after=AFTER)
    found = measure(tiny_model, rows, "a", loss_on=loss_on)["a"]
    tokenizer, model = load_tokenizer(tiny_model), load_causal_lm(tiny_model, EvaluateConfig())
    learnt = encode_example(tokenizer, *texts[1:2], None, texts[2], before, AFTER, loss_on=loss_on)
    assert found["num_tokens"] == sum(label != IGNORED for label in learnt.labels)
    assert found["nll"] == pytest.approx(sum_nll(model, [learnt], 4096)[0], rel=1e-5)
    # Whichever turns are learnt, the sample answers the instruction of the row, which the teacher rewrites elsewhere.
    alone = measure(tiny_model, rows_of(texts, turns_before=before), "a")["a"]
    assert found["answer"] == alone["answer"]


def test_a_student_is_measured_with_the_attention_that_it_was_trained_with(tiny_model: str) -> None:
    rows = rows_of(("short", "Name a colour.", "Blue."), ("long", "Count for a while.", "one two three " * 120))
    exact = measure(tiny_model, rows)
    sizes = {"window": 64, "num_sinks": 1, "lookback": 0, "segment": 0, "exact_below": 128}
    hyper = measure(tiny_model, rows, attention=TrainedAttention("hyper_attention", sizes))
    assert hyper["short"]["nll"] == pytest.approx(exact["short"]["nll"], rel=1e-5)
    assert hyper["long"]["nll"] != pytest.approx(exact["long"]["nll"], rel=1e-6)
    none = measure(tiny_model, rows, attention=TrainedAttention("hyper_attention", sizes, layers=[]))
    assert none["long"]["nll"] == pytest.approx(exact["long"]["nll"], rel=1e-5)


def test_with_a_given_template_a_model_is_measured_as_one_that_has_it(
    tiny_model: str, own_template: str, tmp_path: Path
) -> None:
    rows = rows_of(("a", "Name a colour.", "Blue."))
    actor = ModelActor(tiny_model, ["a"], EvaluateConfig(max_new_tokens=4), TrainedAttention(), own_template)
    [given] = actor(rows).to_pylist()
    load_causal_lm(tiny_model, EvaluateConfig()).save_pretrained(tmp_path)
    load_tokenizer(tiny_model, own_template).save_pretrained(tmp_path)
    expected, own = (measure(model, rows, "a")["a"] for model in (str(tmp_path), tiny_model))
    assert given["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert given["answer"] == expected["answer"]
    assert given["nll"] != pytest.approx(own["nll"], rel=1e-4)
