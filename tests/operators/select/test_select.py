import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.columns import INSTRUCTION_REFLECTED, RECYCLED, RESPONSE_REFLECTED, SELECTED, conform
from operators.select.config import SelectConfig
from operators.select.ifd import Pair, Score, ScoreConfig, StudentScorer, Turn, guess_request
from operators.select.score_store import Scorer
from operators.select.select import (
    better_instruction_pair,
    better_response,
    chosen_instruction,
    chosen_response,
    is_learnable,
    new_is_better,
    response_choice,
    select_instructions,
    select_responses,
    select_rows,
)

UNUSABLE = (None, math.nan, math.inf, -math.inf)
POOL = ScoreConfig(cpus_per_actor=0.5, batch_rows=4)


def a_row(**changes: Any) -> dict[str, Any]:
    row = {
        "row_id": "r",
        "instruction": "old instruction",
        "input": "",
        "response": "old answer",
        "origin": "here",
        "escaped": False,
        "outcome": "",
        "better_instruction": "new instruction",
        "better_instruction_response": "its answer",
        "instruction_critique": "{}",
        "instruction_reflection": "parsed",
        "selected_instruction": "old instruction",
        "selected_response": "old answer",
        "better_response": "better answer",
        "response_critique": "{}",
        "response_reflection": "parsed",
    }
    return row | changes


@pytest.mark.parametrize("measure", ["ifd", "rifd", "perplexity"])
@pytest.mark.parametrize(("old", "new"), [*product(UNUSABLE, (*UNUSABLE, 0.5)), *product((0.5,), UNUSABLE)])
def test_without_two_finite_scores_the_original_stays(measure: Any, old: float | None, new: float | None) -> None:
    assert not new_is_better(measure, old, new)


@pytest.mark.parametrize(
    ("measure", "old", "new", "taken"),
    [
        ("ifd", 0.5, 0.6, True),
        ("ifd", 0.6, 0.5, False),
        ("ifd", 0.5, 0.5, False),
        ("ifd", 0.5, 1.0, False),
        ("ifd", 0.5, 1.2, False),
        ("ifd", 1.2, 0.9, False),
        ("ifd", 0.0, 0.1, True),
        ("rifd", 0.6, 0.5, True),
        ("rifd", 0.5, 0.6, False),
        ("rifd", 0.5, 0.5, False),
        ("rifd", 1.4, 1.0, False),
        ("rifd", 1.4, 1.2, False),
        ("rifd", 1.4, 0.9, True),
        ("rifd", 0.5, 0.0, True),
        ("perplexity", 12.0, 9.0, True),
        ("perplexity", 9.0, 12.0, False),
        ("perplexity", 9.0, 9.0, False),
        ("reward", -3.0, 2.5, True),
        ("reward", 2.5, -3.0, False),
        ("reward", 2.5, 2.5, False),
        (None, None, None, True),
        (None, 0.5, math.nan, True),
    ],
)
def test_the_better_score_wins_and_a_tie_keeps_the_original(
    measure: Any, old: float | None, new: float | None, taken: bool
) -> None:
    assert new_is_better(measure, old, new) is taken


@pytest.mark.parametrize(
    "changes",
    [
        {"instruction_reflection": "rejected:no_json"},
        {"instruction_reflection": None},
        {"better_instruction": None},
        {"better_instruction": " "},
        {"better_instruction_response": None},
        {"better_instruction_response": ""},
    ],
)
def test_a_new_instruction_never_meets_an_old_answer(changes: dict[str, Any]) -> None:
    row = a_row(**changes)
    assert better_instruction_pair(row) is None
    for measure, old, new in ((None, None, None), ("ifd", 0.1, 0.9)):
        chosen = chosen_instruction(row, measure, old, new)  # type: ignore[arg-type]
        assert chosen == {"selected_instruction": "old instruction", "selected_response": "old answer"}


@pytest.mark.parametrize("status", ["parsed", "repaired"])
def test_a_winning_instruction_brings_its_own_answer(status: str) -> None:
    chosen = chosen_instruction(a_row(instruction_reflection=status), "ifd", 0.5, 0.6)
    assert chosen == {"selected_instruction": "new instruction", "selected_response": "its answer"}


@pytest.mark.parametrize(
    "changes",
    [{"response_reflection": "rejected:refusal"}, {"response_reflection": None}, {"better_response": "\n"}],
)
def test_an_unparsed_response_replaces_nothing(changes: dict[str, Any]) -> None:
    row = a_row(**changes)
    assert better_response(row) is None
    final = chosen_response(row, None, None, None, keep_unreflected=True)
    assert (final["final_response"], final["outcome"]) == ("old answer", "original")


@pytest.mark.parametrize(
    ("instruction_won", "response_won", "outcome"),
    [(False, False, "original"), (True, False, "instruction"), (False, True, "response"), (True, True, "both")],
)
@pytest.mark.parametrize("keep", [True, False])
def test_the_outcome_says_which_reflections_were_chosen(
    instruction_won: bool, response_won: bool, outcome: str, keep: bool
) -> None:
    new = {"selected_instruction": "new instruction", "selected_response": "its answer"}
    row = a_row(**(new if instruction_won else {}))
    final = chosen_response(row, "rifd", 0.5, 0.4 if response_won else 0.6, keep_unreflected=keep)
    if not keep and not response_won:
        assert final == {"final_instruction": None, "final_response": None, "outcome": "dropped:response_not_reflected"}
        return
    assert final["outcome"] == outcome
    assert final["final_instruction"] == row["selected_instruction"]
    assert final["final_response"] == ("better answer" if response_won else row["selected_response"])


@pytest.mark.parametrize(
    ("final_ifd", "required", "outcome"),
    [(0.7, True, "response"), (1.3, True, "original"), (1.0, True, "original"), (1.3, False, "response")],
)
def test_a_better_response_must_also_have_an_ifd_below_one(final_ifd: float, required: bool, outcome: str) -> None:
    asked = guess_request("")[:12]

    class Scores:
        def of(self, turns: Sequence[tuple[str, Turn]]) -> list[Score]:
            is_ifd = not turns[0][1][0].startswith(asked)
            old_and_new = [0.6, 0.4] * len(turns)
            return [
                Score(math.log(final_ifd if is_ifd else value), 0.0)
                for value, _ in zip(old_and_new, turns, strict=False)
            ]

    table = conform(pa.Table.from_pylist([a_row()]), RESPONSE_REFLECTED)
    [row] = select_rows(table, Scores(), response_choice(SelectConfig(require_final_ifd=required))).to_pylist()  # type: ignore[arg-type]
    assert row["outcome"] == outcome
    assert row["rifd_better_response"] == pytest.approx(0.4)
    assert row["ifd_better_response"] == (pytest.approx(final_ifd) if required else None)


def test_a_reflection_that_repeats_the_original_counts_as_original() -> None:
    same = a_row(better_instruction="old instruction", better_instruction_response="old answer")
    assert chosen_response(same, "rifd", 0.5, 0.6, keep_unreflected=True)["outcome"] == "original"


@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [
        ("none", None, None),
        ("ifd", "ifd", None),
        ("ifd_rifd", "ifd", "rifd"),
        ("perplexity", "perplexity", "perplexity"),
    ],
)
def test_each_policy_compares_its_own_measure(policy: Any, first: str | None, second: str | None) -> None:
    config = SelectConfig(policy=policy)
    assert (config.first_measure(), config.second_measure()) == (first, second)


ROWS = [
    a_row(row_id="plain"),
    a_row(row_id="left", outcome="quarantined:empty_response", response="", better_instruction=None),
    a_row(row_id="rejected", instruction_reflection="rejected:cut_off", response_reflection="rejected:cut_off"),
    a_row(row_id="unscored", better_instruction_response="ok " * 400, better_response="ok " * 400),
    a_row(row_id="with_input", input="an input"),
]


def dataset(schema: pa.Schema) -> Any:
    import ray

    rows = [{name: row[name] for name in schema.names if name in row} for row in ROWS]
    return ray.data.from_arrow(pa.Table.from_pylist(rows, schema=schema))


def by_id(rows: Any) -> dict[str, dict[str, Any]]:
    found = rows.take_all()
    assert len(found) == len(ROWS)
    return {row["row_id"]: row for row in found}


def test_policy_none_takes_every_parsed_reflection_and_loads_no_model(local_ray: None) -> None:
    config = SelectConfig(policy="none")
    selected = select_instructions(dataset(INSTRUCTION_REFLECTED), config, Scorer("/no/such/model", POOL, "/no/ledger"))
    assert selected.schema().base_schema == SELECTED
    rows = by_id(selected)
    assert rows["plain"]["selected_instruction"] == "new instruction"
    assert rows["rejected"]["selected_instruction"] == "old instruction"
    assert rows["left"]["selected_instruction"] is None
    recycled = select_responses(dataset(RESPONSE_REFLECTED), config, Scorer("/no/such/model", POOL, "/no/ledger"))
    assert recycled.schema().base_schema == RECYCLED
    rows = by_id(recycled)
    outcomes = {row_id: row["outcome"] for row_id, row in rows.items()}
    expected = dict.fromkeys(outcomes, "response")
    assert outcomes == expected | {"left": "quarantined:empty_response", "rejected": "original"}
    assert rows["left"]["final_response"] is None


@pytest.mark.usefixtures("map_here")
@pytest.mark.parametrize("policy", ["ifd", "ifd_rifd", "perplexity"])
def test_instructions_are_chosen_by_the_students_scores(tiny_model: str, tmp_path: Path, policy: Any) -> None:
    config = SelectConfig(policy=policy)
    pool = POOL.model_copy(update={"max_tokens": 300})
    rows = by_id(select_instructions(dataset(INSTRUCTION_REFLECTED), config, Scorer(tiny_model, pool, str(tmp_path))))
    scorer = StudentScorer(tiny_model, pool)
    for name in ("plain", "with_input"):
        row = rows[name]
        pairs = [
            Pair(row["instruction"], row["input"], row["response"]),
            Pair(row["better_instruction"], row["input"], row["better_instruction_response"]),
        ]
        old, new = (score.perplexity if policy == "perplexity" else score.ratio for score in scorer.ifd(pairs))
        assert (row["ifd_original"], row["ifd_better_instruction"]) == pytest.approx((old, new), rel=1e-4)
        taken = new_is_better(config.first_measure(), old, new)
        assert row["selected_instruction"] == ("new instruction" if taken else "old instruction")
    assert rows["rejected"]["ifd_original"] is not None
    assert rows["rejected"]["ifd_better_instruction"] is None
    assert rows["rejected"]["ifd_unscored"] is None
    assert rows["unscored"]["ifd_better_instruction"] is None
    assert rows["unscored"]["ifd_unscored"] == "better_instruction:over_max_tokens"
    assert rows["unscored"]["selected_response"] == "old answer"
    assert rows["left"]["ifd_original"] is None
    assert rows["left"]["outcome"] == "quarantined:empty_response"


@pytest.mark.parametrize("keep", [pytest.param(True, id="real actors", marks=pytest.mark.slow), False])
def test_responses_are_chosen_by_the_students_scores(
    tiny_model: str, local_ray: None, tmp_path: Path, keep: bool, request: pytest.FixtureRequest
) -> None:
    if not keep:
        request.getfixturevalue("map_here")
    config = SelectConfig(keep_unreflected_responses=keep)
    pool = POOL.model_copy(update={"max_tokens": 300})
    rows = by_id(select_responses(dataset(RESPONSE_REFLECTED), config, Scorer(tiny_model, pool, str(tmp_path))))
    for name in ("plain", "with_input"):
        row = rows[name]
        old, new = row["rifd_selected"], row["rifd_better_response"]
        pairs = [Pair("old instruction", row["input"], text) for text in ("old answer", "better answer")]
        ratios = [score.ratio for score in StudentScorer(tiny_model, pool).reverse_ifd(pairs)]
        assert [old, new] == pytest.approx(ratios, rel=1e-4)
        left = "original" if keep else "dropped:response_not_reflected"
        final = StudentScorer(tiny_model, pool).ifd([Pair("old instruction", row["input"], "better answer")])[0].ratio
        assert row["ifd_better_response"] == pytest.approx(final, rel=1e-4)
        taken = new_is_better("rifd", old, new) and is_learnable(final)
        assert row["outcome"] == ("response" if taken else left)
    assert rows["unscored"]["rifd_unscored"] == "better_response:over_max_tokens"
    assert rows["unscored"]["outcome"] == ("original" if keep else "dropped:response_not_reflected")
    assert rows["left"]["outcome"] == "quarantined:empty_response"
    assert all(row["outcome"] for row in rows.values())


def test_an_input_without_the_columns_is_refused_by_name(local_ray: None) -> None:
    import ray

    rows = ray.data.from_arrow(pa.table({"row_id": ["r"]}))
    with pytest.raises(ValueError, match=r"select_instructions: columns .*better_instruction"):
        select_instructions(rows, SelectConfig(), Scorer("m", POOL, "/no/ledger"))


def test_a_misspelt_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="ifd_rifd"):
        SelectConfig(policy="ifdrifd")  # type: ignore[arg-type]
    assert SelectConfig().policy == "ifd_rifd"
