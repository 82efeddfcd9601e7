import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators.evaluate.alpaca_eval import alpaca_eval_files
from operators.evaluate.config import EvaluateConfig, TrainedAttention
from operators.evaluate.evaluate import Models, Rival, _on_tasks, evaluate, spread
from operators.evaluate.model_actor import MEASURED, prompt_of
from operators.evaluate.results import BEST, RELEASED, Evaluation, HeldOutLoss
from operators.evaluate.rows import read_rows
from operators.student.encode import encode_example, load_tokenizer
from operators.student.greedy_answers import greedy_answers
from operators.student.nll import load_causal_lm
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger
from tests.operators.evaluate.held_out_rows import Text, held_out, measure_here

TEACHER = TeacherConfig(backend="scripted", model="fluent")
POOL = {"cpus_per_actor": 0.5, "batch_rows": 3, "max_new_tokens": 8, "num_samples": 3}
ALPACA_EVAL = {"instruction", "output", "generator", "dataset"}  # of example/outputs.json there, but for its datasplit
TEXTS: list[Text] = [
    ("a", "Name a colour.", "", "Blue is a colour."),
    ("b", "Translate to French.", "Good morning", "Bonjour"),
    ("c", "Count to five.", "", "one two three four five"),
    ("d", "Say nothing much, at some length.", "", "Well. " * 30),
    ("e", "Write a line about rain.", None, "Rain falls on the roof."),
]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    """Use no pool of actors, which would start one more process per model."""
    monkeypatch.setattr("operators.evaluate.evaluate._measure", measure_here)


@pytest.fixture(scope="module")
def other_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with other weights, as a trained student."""
    folder = str(tmp_path_factory.mktemp("models") / "other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def models(folder: Path, base: str, student: str, **more: Any) -> Models:
    return Models(base, student, str(folder / "rows.parquet"), **more)


def independent_loss(folder: str, texts: list[Text]) -> tuple[float, int]:
    """Token-weighted mean by transformers' own loss in float64, one row at a time."""
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    total, tokens = 0.0, 0
    for _, instruction, context, response in texts:
        encoded = encode_example(tokenizer, instruction, context, response)
        count = sum(label != -100 for label in encoded.labels)
        with torch.no_grad():
            loss = model(torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss
        total, tokens = total + loss.item() * count, tokens + count
    return total / tokens, tokens


@pytest.mark.parametrize(
    ("actors", "rows", "working", "blocks"), [(1, 2, 1, 1), (8, 2, 3, 3), (2, 2, 2, 3), (8, 9, 1, 1)]
)
def test_rows_in_one_block_are_spread_over_the_actors_that_they_need(
    actors: int, rows: int, working: int, blocks: int, local_ray: None
) -> None:
    parts, num_actors = spread(held_out(TEXTS), EvaluateConfig(actors=actors, batch_rows=rows))
    assert num_actors == working
    made = parts.materialize()
    assert made.num_blocks() == blocks
    assert sorted(row["row_id"] for row in made.take_all()) == [text[0] for text in TEXTS]


@pytest.mark.slow
def test_losses_and_samples_of_both_models(tiny_model: str, other_model: str, local_ray: None, tmp_path: Path) -> None:
    config = EvaluateConfig(**POOL, actors=2)  # type: ignore[arg-type]
    ledger = Ledger(str(tmp_path))
    result = evaluate(held_out(TEXTS), config, models(tmp_path, tiny_model, other_model), TEACHER, ledger)
    loss = result.held_out_loss
    base, num_tokens = independent_loss(tiny_model, TEXTS)
    student, _ = independent_loss(other_model, TEXTS)
    assert (loss.base, loss.student) == pytest.approx((base, student), rel=1e-4)
    assert base != pytest.approx(student, rel=1e-3), "the two models must differ for this test to mean anything"
    assert (loss.num_tokens, loss.num_rows, loss.unscored) == (num_tokens, len(TEXTS), {})
    assert [sample.row_id for sample in result.samples] == ["a", "b", "c"]
    sample = result.samples[1]
    assert (sample.instruction, sample.input, sample.reference) == TEXTS[1][1:]
    assert 0 < sample.base_tokens <= config.max_new_tokens
    judge = result.judge
    assert judge.num_pairs + judge.unparsed == 3
    assert {sample.verdict for sample in result.samples} <= {"win", "tie", "loss", "unparsed"}
    assert Evaluation.model_validate(json.loads(json.dumps(result.model_dump(mode="json"), allow_nan=False))) == result
    change = loss.change
    assert change.estimate == pytest.approx(student - base, rel=1e-3)
    assert change.quantiles[0] < change.estimate < change.quantiles[-1]
    rows = read_rows(result.rows)
    assert rows is not None
    assert rows["row_id"].to_pylist() == [text[0] for text in TEXTS]
    assert rows["student_answer"].null_count == 2
    files = {name: json.loads(text) for name, text in alpaca_eval_files(result.samples, "base", "new").items()}
    for role, records in ((role, files[f"{role}.json"]) for role in ("base", "student")):
        assert [record["output"] for record in records] == [getattr(sample, role) for sample in result.samples]
        assert all(set(record) == ALPACA_EVAL for record in records)


def test_the_base_model_is_measured_with_the_configured_template(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, str] = {}

    def measure(rows: Any, model: str, *more: Any) -> Any:
        used[model] = more[3] if len(more) > 3 else ""
        return MEASURED.empty_table()

    monkeypatch.setattr("operators.evaluate.evaluate._measure", measure)
    given = models(tmp_path, "base", "new", chat_template="a template")
    evaluate(held_out(TEXTS[:2]), EvaluateConfig(judge=False), given, TEACHER, Ledger(str(tmp_path)))
    assert used == {"base": "a template", "new": ""}, "the student has it in its folder"


def test_tasks_are_asked_of_base_student_and_released_student(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    written: dict[str, str] = {}

    def measure(models: Any, *more: Any) -> None:
        asked.update(models)
        written.update(more[-1])

    monkeypatch.setattr("operators.evaluate.evaluate.measure_tasks", measure)
    old = TrainedAttention("hyper_attention", {"window": 64})
    rivals = [Rival("v1", RELEASED, "v1.parquet", "students/v1", old), Rival("v0", BEST, "v0.parquet", "students/v0")]
    hyper = TrainedAttention("hyper_attention")
    _on_tasks(Models("base", "new", "rows", hyper, rivals, chat_template="a template"), EvaluateConfig())
    assert written == {"base": "a template"}, "students have their template in their folder"
    assert {role: folder for role, (folder, _) in asked.items()} == {
        "base": "base",
        "student": "new",
        RELEASED: "students/v1",
    }
    assert {role: attention for role, (_, attention) in asked.items()} == {
        "base": TrainedAttention(),
        "student": hyper,
        RELEASED: old,
    }


@pytest.mark.slow
def test_an_earlier_student_is_compared_on_common_rows_without_loading_it(
    tiny_model: str, other_model: str, in_process: None, tmp_path: Path
) -> None:
    config = EvaluateConfig(**POOL)  # type: ignore[arg-type]
    ledger = Ledger(str(tmp_path / "ledger"))
    first = evaluate(held_out(TEXTS[:4]), config, models(tmp_path / "a", tiny_model, other_model), TEACHER, ledger)
    rival = Rival("v1", RELEASED, first.rows)
    gone = Rival("v0", RELEASED, str(tmp_path / "gone.parquet"))
    again = models(tmp_path / "b", tiny_model, tiny_model, rivals=[rival, gone])
    second = evaluate(held_out(TEXTS), config, again, TEACHER, ledger)
    compared, missing = second.rivals
    assert (compared.version, compared.change.num_rows) == ("v1", 4)
    expected = independent_loss(tiny_model, TEXTS[:4])[0] - independent_loss(other_model, TEXTS[:4])[0]
    assert compared.change.estimate == pytest.approx(expected, rel=1e-3)
    assert compared.judge is not None
    assert (missing.change.num_rows, missing.judge) == (0, None)


@pytest.mark.slow
def test_without_judge_the_teacher_is_not_asked(tiny_model: str, in_process: None, tmp_path: Path) -> None:
    config = EvaluateConfig(**POOL | {"judge": False})  # type: ignore[arg-type]
    ledger = Ledger(str(tmp_path))
    result = evaluate(held_out(TEXTS), config, models(tmp_path, tiny_model, tiny_model), TEACHER, ledger)
    assert result.judge is None
    assert all(sample.base == sample.student for sample in result.samples)
    assert result.held_out_loss.base == pytest.approx(result.held_out_loss.student, rel=1e-9)
    assert ledger.metrics().get("calls", 0) == 0


@pytest.mark.slow
def test_rows_that_cannot_be_scored_are_counted_by_reason(tiny_model: str, in_process: None, tmp_path: Path) -> None:
    bad = [
        ("0long", "Count. " * 200, "", "one two"),
        ("1markup", "Say hello<|im_end|>.", "", "hello"),
        *TEXTS,
    ]
    config = EvaluateConfig(**POOL | {"max_tokens": 150, "judge": False})  # type: ignore[arg-type]
    result = evaluate(held_out(bad), config, models(tmp_path, tiny_model, tiny_model), TEACHER, Ledger(str(tmp_path)))
    loss = result.held_out_loss
    assert loss.unscored == {"over_max_tokens": 1, "special_tokens": 1}
    assert loss.num_rows == len(TEXTS)
    assert loss.base == pytest.approx(independent_loss(tiny_model, TEXTS)[0], rel=1e-4)
    assert result.unanswered == 2
    assert [sample.row_id for sample in result.samples] == ["a"]


@pytest.mark.slow
def test_a_student_with_broken_weights_has_no_loss(tiny_model: str, in_process: None, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "broken")
    config = EvaluateConfig(**POOL | {"num_samples": 0})  # type: ignore[arg-type]
    broken, ledger = str(tmp_path / "broken"), Ledger(str(tmp_path / "ledger"))
    result = evaluate(held_out(TEXTS), config, models(tmp_path, tiny_model, broken), TEACHER, ledger)
    assert (result.samples, result.judge, ledger.metrics()) == ((), None, {}), "no sample, nothing to judge"
    assert result.held_out_loss.student is None
    assert result.held_out_loss.base is not None
    assert result.held_out_loss.unscored == {"not_finite": len(TEXTS)}


def test_without_held_out_rows_there_is_no_loss_and_no_model_is_loaded(local_ray: None, tmp_path: Path) -> None:
    result = evaluate(
        held_out([]), EvaluateConfig(), models(tmp_path, "/no/model", "/no/model"), TEACHER, Ledger(str(tmp_path))
    )
    assert result.held_out_loss == HeldOutLoss()
    assert (result.samples, result.judge) == ((), None)


def one_by_one(folder: str, prompts: list[list[int]], max_new_tokens: int, penalty: float) -> list[str]:
    """Greedy answers computed simply: one prompt at a time, no cache, no padding, transformers' penalty rule."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_batched_answers_equal_answers_one_by_one(demo_model: str, penalty: float) -> None:
    tokenizer = load_tokenizer(demo_model)
    prompts = [prompt_of(encode_example(tokenizer, *text[1:])) for text in TEXTS[:3]]
    model = load_causal_lm(demo_model, EvaluateConfig())
    batched = greedy_answers(model, tokenizer, prompts, max_new_tokens=12, repetition_penalty=penalty, batch_rows=2)
    assert [answer for answer, _ in batched] == one_by_one(demo_model, prompts, 12, penalty)
    assert all(0 < num_tokens <= 12 for _, num_tokens in batched)
