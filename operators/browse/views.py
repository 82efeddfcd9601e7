"""What the browse pages show of a row and of a teacher's call, and the pages themselves; every text is escaped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from operators.browse.scan import KIND_END, Page
from operators.columns import RECYCLED_OUTCOMES
from operators.redact import without_credentials
from operators.report.page import page_environment
from operators.report.pairs import cut_critique, cut_text

ACTIVE_NAME = "active"  # stands for the empty outcome of an active row
MAX_CHARS = 6000  # of one text on a page; the cut is marked
# The columns with the text that the next stage would use: the first one that is not empty.
AFTER = {
    "instruction": ("final_instruction", "selected_instruction", "better_instruction"),
    "response": ("final_response", "better_response", "selected_response", "better_instruction_response"),
}
OFFERED = {
    "instruction": ("better_instruction",),
    "response": ("better_response", "better_instruction_response"),
}
CRITIQUES = ("instruction_critique", "response_critique")
SCORES = {  # column -> its measure under a policy that compares IFD, and the text that it scores
    "ifd_original": ("IFD", "the original"),
    "ifd_better_instruction": ("IFD", "the rewrite"),
    "rifd_selected": ("r-IFD", "the response kept so far"),
    "rifd_better_response": ("r-IFD", "the rewrite"),
    "ifd_better_response": ("IFD", "the rewritten response"),
}
REFLECTIONS = ("instruction_reflection", "response_reflection")  # columns with what became of the teacher's reply
KINDS = ("parsed", "repaired", "rejected:", "filtered:")  # of these columns; a reason may follow the last two
STATUSES = (*REFLECTIONS, "ifd_unscored", "rifd_unscored")
TURNS = ("turns_before", "turns_after")
_SHOWN = {"row_id", "outcome", "origin", "instruction", "input", "response", *CRITIQUES, *SCORES, *STATUSES, *TURNS}
_SHOWN |= {name for names in (*AFTER.values(), *OFFERED.values()) for name in names}
UNSHOWN = ("input_ids", "labels", "position_ids")  # thousands of numbers a row
SEARCHED = (
    *("row_id", "instruction", "input", "response", "turns_before", "turns_after"),
    *("better_instruction", "better_instruction_response", "better_response", "final_instruction", "final_response"),
    *CRITIQUES,
    *REFLECTIONS,
)
REPLY_COLUMNS = (
    *("call_key", "row_id", "reply", "finish_reason", "prompt_tokens", "generated_tokens", "error", "model", "created"),
)
REPLIES_SEARCHED = ("row_id", "reply", "error")


def row_view(row: Mapping[str, Any], policy: str = "") -> dict[str, Any]:
    """A row of any stage for its card: texts before and after, rewrites, critiques, scores, other columns.

    Args:
        row: of a stage.
        policy: `select.policy` of the run that scored it; the scores' columns have the same names under each.
    """
    texts = []
    for name in ("instruction", "response"):
        before, after = row.get(name), _first(row, AFTER[name])
        offered = _first(row, OFFERED[name])
        not_kept = offered if offered is not None and offered != after else None
        if before is not None:
            texts.append(
                {
                    "name": name.capitalize(),
                    "before": _cut(before),
                    "after": _cut(before if after is None else after),
                    "not_kept": None if not_kept is None else _cut(not_kept),
                }
            )
    rest = {name: value for name, value in row.items() if name not in _SHOWN and value not in (None, "", False)}
    return {
        "row_id": str(row.get("row_id") or ""),
        "outcome": row.get("outcome"),
        "origin": row.get("origin") or "",
        "texts": texts,
        "input": _cut(row.get("input") or ""),
        "critiques": {name: cut_critique(row[name], MAX_CHARS) for name in CRITIQUES if row.get(name)},
        "scores": {
            f"{measure_name(policy) or kind} of {text}": row[name]
            for name, (kind, text) in SCORES.items()
            if row.get(name) is not None
        },
        "statuses": {name: row[name] for name in STATUSES if row.get(name)},
        "turns": {name: _turns(row[name]) for name in TURNS if row.get(name)},
        "rest": {
            name: _cut(value if isinstance(value, str) else json.dumps(value, default=str))
            for name, value in rest.items()
        },
    }


def measure_name(policy: str) -> str:
    """What the scores of a policy are called; "" if they are IFD and r-IFD."""
    return policy.capitalize() if policy in ("perplexity", "reward", "judge") else ""


def policy_of(made_from: Mapping[str, Any]) -> str:
    """`select.policy` of a manifest's `made_from`; "" if it has none."""
    return str(made_from.get("config", {}).get("select", {}).get("policy", ""))


def reply_view(
    record: Mapping[str, Any], prompt: str | None, cost: float | None, *, out_of_time: bool = False
) -> dict[str, Any]:
    """One call for its card: the turns that were sent, the raw reply, tokens, cost and error.

    Args:
        record: of the ledger.
        prompt: its messages as JSON; None if they were not found.
        cost: of the call.
        out_of_time: the time of the page was over before all prompts were searched.
    """
    return {
        **{name: record.get(name) for name in REPLY_COLUMNS},
        "reply": _cut(record.get("reply") or ""),
        "error": _cut(record.get("error") or ""),
        "turns": None if prompt is None else _turns(prompt),
        "cost": cost,
        "out_of_time": out_of_time,
    }


def render(template: str, **values: Any) -> str:
    """A page from a template of this room; it can use the report's style sheet and macros."""
    environment = page_environment([Path(__file__).parent])
    environment.filters["redacted"] = without_credentials
    environment.globals |= {"cut_text": _cut, "recycled_outcomes": RECYCLED_OUTCOMES}
    return environment.get_template(template).render(**values)


def choices(outcomes: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """The choices of a filter: (value, label, rows), for all quarantined or dropped rows and for each reason."""
    found = [(outcome or ACTIVE_NAME, outcome or ACTIVE_NAME, count) for outcome, count in outcomes.items()]
    for kind in ("quarantined", "dropped"):
        reasons = [count for outcome, count in outcomes.items() if outcome.startswith(f"{kind}{KIND_END}")]
        if len(reasons) > 1:
            found.append((f"{kind}{KIND_END}", f"{kind}, any reason", sum(reasons)))
    return sorted(found)


def navigation(address: str, page: Page, query: Mapping[str, str]) -> dict[str, Any]:
    """What a template needs for the links to the first and the next page."""
    kept = {key: value for key, value in query.items() if key != "at" and value}
    first = f"{address}?{urlencode(kept)}" if kept else address
    following = f"{address}?{urlencode({**kept, 'at': str(page.following)})}" if page.following else ""
    return {
        "action": address,
        "page": page,
        "shown_rows": len(page.rows),
        "next_href": following,
        "first_href": first,
        "at_start": not query.get("at"),
    }


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _cut(text: str) -> dict[str, Any]:
    return cut_text(text, MAX_CHARS)


def _turns(text: str) -> list[dict[str, Any]]:
    """Role and cut content of each turn; a text that is not a list of turns becomes one turn without a role."""
    try:
        turns = json.loads(text)
        return [{"role": str(turn["role"]), "content": _cut(str(turn["content"]))} for turn in turns]
    except (ValueError, TypeError, KeyError):
        return [{"role": "", "content": _cut(text)}]
