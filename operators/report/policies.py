"""Counts which rewrites of a run each selection policy would keep, as far as they were scored for it.

The run's policy decided in the first comparison which pairs the teacher saw for the second. Under another policy the
teacher would have rewritten other responses; the counts say what that policy keeps of the same rewrites.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from operators.columns import RECYCLED_OUTCOMES
from operators.select.config import Measure, Policy, SelectConfig
from operators.select.select import NOT_REFLECTED, better_instruction_pair, better_response, new_is_better

POLICIES: tuple[Policy, ...] = ("none", "ifd", "ifd_rifd", "perplexity", "reward", "judge")
SIDES = ("instructions", "responses")
OFFERED = "offered"
COLUMNS = (
    *("outcome", "better_instruction", "better_instruction_response", "instruction_reflection"),
    *("better_response", "response_reflection"),
    *("ifd_original", "ifd_better_instruction", "rifd_selected", "rifd_better_response"),
)


def kept_by_policy(rows: pa.Table, policy: str) -> Counter[str]:
    """Numbers of rewrites that a policy keeps, by `<policy>:<side>`, and of all rewrites, by `offered:<side>`.

    Args:
        rows: columns.RECYCLED.
        policy: of the run; another policy is counted only if it compares the same scores, or none.
    """
    kept: Counter[str] = Counter()
    comparable = {
        side: [(other, _measures(other)[side]) for other in POLICIES if _is_scored(other, policy, side)]
        for side in SIDES
    }
    for row in rows.select(COLUMNS).to_pylist():
        if row["outcome"] not in (*RECYCLED_OUTCOMES, NOT_REFLECTED):
            continue
        offers = {
            "instructions": (better_instruction_pair(row), row["ifd_original"], row["ifd_better_instruction"]),
            "responses": (better_response(row), row["rifd_selected"], row["rifd_better_response"]),
        }
        for side, (offer, old, new) in offers.items():
            if offer:
                kept[f"{OFFERED}:{side}"] += 1
                kept.update(f"{name}:{side}" for name, measure in comparable[side] if new_is_better(measure, old, new))
    return kept


def policy_figures(kept: Mapping[str, int], policy: str) -> dict[str, Any]:
    """For the report: the number of rewrites, and one line per policy; null where a policy's scores are missing."""
    lines = [
        {"policy": name, "of_the_run": name == policy}
        | {side: kept.get(f"{name}:{side}", 0) if _is_scored(name, policy, side) else None for side in SIDES}
        for name in POLICIES
    ]
    return {OFFERED: {side: kept.get(f"{OFFERED}:{side}", 0) for side in SIDES}, "kept": lines}


def _measures(policy: str) -> dict[str, Measure | None]:
    config = SelectConfig.model_validate({"policy": policy, "reward_model": "any"})
    return {"instructions": config.first_measure(), "responses": config.second_measure()}


def _is_scored(other: str, policy: str, side: str) -> bool:
    return _measures(other)[side] in (None, _measures(policy)[side])
