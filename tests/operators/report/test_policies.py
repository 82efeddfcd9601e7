"""The same candidates under each policy, counted by the same rule as in a run."""

from typing import Any

import pyarrow as pa

from operators.columns import RECYCLED
from operators.report.policies import kept_by_policy, policy_figures


def row(outcome: str, ifd: tuple[Any, Any], rifd: tuple[Any, Any], **changes: Any) -> dict[str, Any]:
    return {
        "row_id": "r",
        "outcome": outcome,
        "better_instruction": "new",
        "better_instruction_response": "new answer",
        "instruction_reflection": "parsed",
        "better_response": "better",
        "response_reflection": "repaired",
        "ifd_original": ifd[0],
        "ifd_better_instruction": ifd[1],
        "rifd_selected": rifd[0],
        "rifd_better_response": rifd[1],
    } | changes


ROWS = [
    row("both", (0.5, 0.9), (0.8, 0.3)),
    row("response", (0.5, 0.4), (0.8, 0.3)),
    row("original", (0.5, 1.1), (0.2, 0.3)),
    row("dropped:response_not_reflected", (None, 0.4), (0.2, None)),
    row(
        "original",
        (0.5, None),
        (0.2, None),
        instruction_reflection="rejected:no_json",
        response_reflection="filtered:x",
    ),
    row("quarantined:empty", (None, None), (None, None)),
]


def figures(policy: str) -> tuple[dict[str, int], dict[str, tuple[int | None, int | None]]]:
    kept = kept_by_policy(pa.Table.from_pylist(ROWS, schema=RECYCLED), policy)
    found = policy_figures(kept, policy)
    assert [line["policy"] for line in found["kept"] if line["of_the_run"]] == [policy]
    return found["offered"], {line["policy"]: (line["instructions"], line["responses"]) for line in found["kept"]}


def test_policies_that_compare_the_same_scores_are_counted_on_the_same_offer() -> None:
    offered, kept = figures("ifd_rifd")
    assert offered == {"instructions": 4, "responses": 4}
    assert kept == {
        "none": (4, 4),
        "ifd": (1, 4),
        "ifd_rifd": (1, 2),
        "perplexity": (None, None),
        "judge": (None, None),
        "reward": (None, None),
    }


def test_rows_without_a_score_for_a_policy_are_not_counted_for_it() -> None:
    assert figures("none")[1] == {
        "none": (4, 4),
        "ifd": (None, 4),
        "ifd_rifd": (None, None),
        "perplexity": (None, None),
        "judge": (None, None),
        "reward": (None, None),
    }
    assert figures("reward")[1]["reward"] == (2, 1), "higher reward, with no limit at 1"
    assert figures("perplexity")[1]["perplexity"] == (1, 2), "lower perplexity, with no limit at 1"
