"""A student scores a text once, whatever the policy or run and even after a crash; another student scores it anew."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators.columns import INSTRUCTION_REFLECTED
from operators.select.config import SelectConfig
from operators.select.ifd import Pair, Score, ScoreConfig, StudentScorer, Turn, ifd_turn
from operators.select.score_store import (
    KNOWN,
    REWARDS,
    TO_SCORE,
    Scorer,
    Scores,
    _judge,
    _prepare,
    _read_known,
    _ScoringActor,
    map_with_scores,
    score_key,
)
from operators.select.select import select_instructions

POOL = ScoreConfig(batch_rows=3, cpus_per_actor=1.5, max_tokens=300)  # leaves no CPU of two to the shuffle
BLUE = "Blue as the sky"
Mapped = Callable[..., "ray.data.Dataset"]


def named(count: int, start: int = 0) -> "ray.data.Dataset":
    numbers = range(start, start + count)
    texts = {"row_id": [f"r{number}" for number in numbers], "instruction": [f"Name colour {n}" for n in numbers]}
    return ray.data.from_arrow(pa.table(texts))


def colour_turn(row: dict[str, Any]) -> list[Turn]:
    return [ifd_turn(Pair(row["instruction"], "", BLUE))]


def note_ratio(rows: pa.Table, scores: Scores) -> pa.Table:
    pairs = [Pair(text, "", BLUE) for text in rows["instruction"].to_pylist()]
    turns = [(row_id, ifd_turn(pair)) for row_id, pair in zip(rows["row_id"].to_pylist(), pairs, strict=True)]
    return rows.append_column("ratio", pa.array([score.ratio for score in scores.of(turns)], pa.float64()))


def ratios(
    rows: "ray.data.Dataset", student: str, folder: Path, mapped: Mapped = map_with_scores, template: str = ""
) -> dict[str, float]:
    scorer = Scorer(student, POOL, str(folder), chat_template=template)
    scored = mapped(rows, colour_turn, note_ratio, scorer, "ifd").materialize()  # asked for columns, it runs
    if mapped is map_with_scores:
        assert "MapBatches(_ScoringActor):" in scored.stats(), "an operator of its own: tasks tokenize, and decide"
    assert scored.columns() == [*rows.columns(), "ratio"]
    return {row["row_id"]: row["ratio"] for row in scored.take_all()}


def records(folder: Path) -> Counter[str]:
    """How often each text was scored."""
    keys: Counter[str] = Counter()
    for file in folder.rglob("*.parquet"):
        keys.update(pq.read_table(file)["score_key"].to_pylist())
    return keys


@pytest.fixture(scope="module")
def brother(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny student after a step of training: other weights in files of the same sizes."""
    folder = tmp_path_factory.mktemp("models") / "brother"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.long  # `make test` scores with actors in test_select.py
@pytest.mark.usefixtures("local_ray")
def test_actors_score_every_row_as_one_scorer_does_and_a_second_run_scores_none(
    tiny_model: str, tmp_path: Path
) -> None:
    first = ratios(named(7), tiny_model, tmp_path)
    turns = [ifd_turn(Pair(f"Name colour {number}", "", BLUE)) for number in range(7)]
    alone = [score.ratio for score in StudentScorer(tiny_model, POOL).score(turns)]
    assert [first[f"r{number}"] for number in range(7)] == pytest.approx(alone, rel=1e-5)
    assert ratios(named(7), tiny_model, tmp_path) == first
    assert set(records(tmp_path).values()) == {1}


def test_only_new_rows_are_scored_and_rows_that_left_do_no_harm(
    tiny_model: str, tmp_path: Path, map_here: Mapped
) -> None:
    first = ratios(named(5), tiny_model, tmp_path, map_here)
    more = ratios(named(5, start=3), tiny_model, tmp_path, map_here)
    assert set(more) == {f"r{number}" for number in range(3, 8)}
    assert {name: more[name] for name in ("r3", "r4")} == {name: first[name] for name in ("r3", "r4")}
    assert records(tmp_path).total() == 8


def test_known_scores_need_no_student(tiny_model: str, tmp_path: Path, map_here: Mapped) -> None:
    first = ratios(named(3), tiny_model, tmp_path, map_here)
    weights = Path(tiny_model) / "model.safetensors"
    stored = weights.read_bytes()
    try:  # a file of the same size and time that cannot be loaded
        stat = weights.stat()
        weights.write_bytes(bytes(len(stored)))
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert ratios(named(3), tiny_model, tmp_path, map_here) == first
    finally:
        weights.write_bytes(stored)


def test_another_student_scores_anew_even_if_its_files_have_the_same_sizes(
    tiny_model: str, brother: str, tmp_path: Path, map_here: Mapped
) -> None:
    sizes = {(Path(model) / "model.safetensors").stat().st_size for model in (tiny_model, brother)}
    assert len(sizes) == 1
    first, second = (ratios(named(2), model, tmp_path, map_here) for model in (tiny_model, brother))
    assert all(first[name] != pytest.approx(second[name], rel=1e-6) for name in first)
    assert len(list((tmp_path / "ifd").iterdir())) == 2


def test_another_template_scores_anew_and_as_a_student_that_has_it(
    tiny_model: str, own_template: str, tmp_path: Path, map_here: Mapped
) -> None:
    own = ratios(named(2), tiny_model, tmp_path, map_here)
    given = ratios(named(2), tiny_model, tmp_path, map_here, own_template)
    assert all(own[name] != pytest.approx(given[name], rel=1e-6) for name in own)
    assert len(list((tmp_path / "ifd").iterdir())) == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = own_template
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "with")
    tokenizer.save_pretrained(tmp_path / "with")
    expected = ratios(named(2), str(tmp_path / "with"), tmp_path / "other", map_here)
    assert given == pytest.approx(expected, rel=1e-6)


def test_the_student_s_template_does_not_change_what_a_reward_model_says(tiny_model: str) -> None:
    scorers = [Scorer("", POOL, "folder", tiny_model, template) for template in ("", "a template")]
    assert len({_judge(scorer, REWARDS)[1] for scorer in scorers}) == 1


def reflected(schema: pa.Schema) -> "ray.data.Dataset":
    row: dict[str, Any] = dict.fromkeys(schema.names) | {
        "row_id": "a", "instruction": "Name a colour.", "input": "", "response": BLUE, "outcome": "",
        "escaped": False, "better_instruction": "Name a warm colour.", "instruction_reflection": "parsed",
        "better_instruction_response": "Red is a warm colour.",
    }  # fmt: skip
    return ray.data.from_arrow(pa.Table.from_pylist([row], schema=schema))


@pytest.mark.usefixtures("map_here")
def test_a_changed_policy_scores_nothing_that_the_one_before_had_scored(tiny_model: str, tmp_path: Path) -> None:
    for policy in ("ifd", "ifd_rifd", "perplexity"):
        rows = select_instructions(
            reflected(INSTRUCTION_REFLECTED),
            SelectConfig(policy=policy),  # type: ignore[arg-type]
            Scorer(tiny_model, POOL, str(tmp_path)),
        )
        assert rows.take_all()[0]["ifd_better_instruction"] is not None
        assert records(tmp_path).total() == 2


def test_a_text_that_is_too_short_for_a_score_is_not_scored_again() -> None:
    turn = ifd_turn(Pair("Name it.", "", "x"))
    record = {"score_key": score_key(turn, POOL), "nll_given": None, "nll_alone": None, "reason": "too_short"}
    rows = pa.table({"row_id": ["a"], KNOWN: pa.array([json.dumps([record])], pa.string())})
    prepared = _prepare(rows, lambda _: [turn, turn], StudentScorer("none", POOL), POOL)
    assert prepared[TO_SCORE].to_pylist() == [[]]
    scored = _ScoringActor(StudentScorer("none", POOL), "nowhere")(prepared)
    assert Scores(_read_known(scored), POOL).of([("a", turn)]) == [Score(reason="too_short")]


def test_a_score_belongs_to_a_number_format_and_to_no_device() -> None:
    turn = ifd_turn(Pair("Name it.", "", "x"))
    on_gpus = POOL.model_copy(update={"gpus_per_actor": 1.0})
    coarser = POOL.model_copy(update={"precision": "bf16"})
    assert score_key(turn, on_gpus) == score_key(turn, POOL) != score_key(turn, coarser)
