"""Counts, histograms and sampled pairs of a run, added up from one small partial result per block.

Cost: one pass over the recycled rows and one over the packs. A partial result holds counts and at most `num_pairs` cut
pairs per outcome, so the driver's memory does not grow with the data.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.data import Dataset

from operators import columns
from operators.report.collected import Collected, LengthCounts, PackCounts, RowCounts, ScoreCounts, TokenCounts
from operators.report.pairs import REFLECTIONS, draw_pairs, lowest
from operators.report.policies import kept_by_policy, policy_figures
from operators.stage import StageConfig, require_columns
from operators.train.mixture import is_general
from operators.train.overlong import is_first_part

# Words: two bins per doubling, so that bars are equally wide on a logarithmic axis; the last bin is open.
WORD_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Scores: perplexity ratios; 1 is an edge because the policy keeps texts below it; the last bin is open.
RATIO_EDGES = tuple(round(step * 0.05, 2) for step in range(41))
# Policy perplexity uses perplexities as scores, which spread over orders of magnitude.
# Rewards are in the unit of their model, most of them near 0; values outside the edges count in the first or last bin.
RATIO, PERPLEXITY, REWARD, JUDGE = "ratio", "perplexity", "reward", "judge"
SCORE_EDGES: dict[str, tuple[float, ...]] = {
    RATIO: RATIO_EDGES,
    PERPLEXITY: WORD_EDGES,
    REWARD: tuple(float(step) for step in range(-16, 17)),
    JUDGE: tuple(float(step) for step in range(1, 11)),
}
# The text that a score belongs to: if there is no text, a null score is not counted; if there is one, it is unscored.
SCORED_TEXTS = {
    "ifd_original": "instruction",
    "ifd_better_instruction": "better_instruction",
    "rifd_selected": "selected_instruction",
    "rifd_better_response": "better_response",
}
# Why a score is missing, as "original:<reason>,better_instruction:<reason>".
UNSCORED = ("ifd_unscored", "rifd_unscored")
_OF_PACKING = ("packs", "documents", "rows", "general_rows", "tokens", "supervised_tokens", "cut_rows", "lost_tokens")
LENGTHS = {"instruction": ("instruction", "final_instruction"), "response": ("response", "final_response")}

Counts = dict[str, Counter[str]]


class ReportConfig(StageConfig):
    """Configuration of the report, the section `report`: how many pairs, samples and characters it shows."""

    num_pairs: int = Field(
        default=3, ge=0, description="Number of pairs, before and after, that the report shows for each outcome."
    )
    num_samples: int = Field(
        default=8,
        ge=0,
        description="Number of sample answers of base model and student that the report shows side by side.",
    )
    max_chars: int = Field(
        default=3000,
        gt=0,
        description="Longest part of one text that the report shows, in characters; a cut is marked.",
    )
    seed: int = Field(default=0, description="Seed of the choice of pairs that the report shows.")


def collect_figures(
    recycled: Dataset | None, packs: Dataset | None, report: ReportConfig, policy: str = "ifd_rifd"
) -> Collected:
    """Aggregate both data sets to counts, histograms and a sample; rows never reach the driver.

    Columns in: `columns.RECYCLED`, `columns.PACKS`; None for a stage that did not run.

    Args:
        policy: `select.policy`, which decides what the scores are: perplexities, rewards or verdicts for the policies
            of these names, ratios for all others.

    Raises:
        ValueError: a column is missing.
    """
    measure = policy if policy in SCORE_EDGES else RATIO
    counts, pairs = _fold_rows(recycled, report, policy, measure)
    packed = _fold_packs(packs)
    return Collected(
        rows=_rows(counts["outcome"], counts["escaped"], packed),
        lengths={name: _lengths(counts, name) for name in LENGTHS},
        scores={name: _scores(counts, name, measure) for name in SCORED_TEXTS},
        reflections={name: dict(counts[name].most_common()) for name in REFLECTIONS},
        policies=policy_figures(counts["kept"], policy),
        packing=_packing(packed) if packed else None,
        pairs=pairs,
    )


def bin_counts(lengths: Counter[str], edges: Sequence[float]) -> list[int]:
    """Turn counts by value into counts by bin [edge, next edge); the last bin is open upwards."""
    values = np.array([float(value) for value in lengths], dtype=np.float64)
    bins = np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="right") - 1
    totals = np.bincount(bins, weights=np.array(list(lengths.values()), dtype=np.float64), minlength=len(edges))
    return [int(total) for total in totals]


def _fold_rows(
    recycled: Dataset | None, report: ReportConfig, policy: str, measure: str
) -> tuple[Counts, list[dict[str, Any]]]:
    names = (
        "outcome",
        "escaped",
        "kept",
        "score_sum",
        "scored",
        "unscored",
        *REFLECTIONS,
        *SCORED_TEXTS,
        *UNSCORED,
    )
    words = tuple(f"{name}_{side}" for name in LENGTHS for side in ("before", "after"))
    counts: Counts = {name: Counter() for name in (*names, *words)}
    pairs: dict[str, list[Any]] = {outcome: [] for outcome in columns.RECYCLED_OUTCOMES}
    if recycled is not None:
        require_columns("report", columns.RECYCLED.names, recycled.columns() or columns.RECYCLED.names)
        for part in _partials(recycled, _summarise_rows, {"report": report, "policy": policy, "measure": measure}):
            _add(counts, part["counts"])
            for outcome, drawn in part["pairs"].items():
                pairs[outcome] = lowest(pairs[outcome] + drawn, report.num_pairs)
    return counts, [pair for outcome in columns.RECYCLED_OUTCOMES for _, _, pair in pairs[outcome]]


def _fold_packs(packs: Dataset | None) -> Counts | None:
    if packs is None:
        return None
    require_columns("report", columns.PACKS.names, packs.columns() or columns.PACKS.names)
    counts: Counts = {
        name: Counter() for name in ("total", "unpacked", "general_unpacked", "document_tokens", "pack_slots")
    }
    for part in _partials(packs, _summarise_packs, {}):
        _add(counts, part["counts"])
    return counts


def _partials(rows: Dataset, summarise: Any, arguments: dict[str, Any]) -> Iterable[dict[str, Any]]:
    parts = rows.map_batches(
        summarise, fn_kwargs=arguments, batch_size=None, batch_format="pyarrow", num_cpus=0.5, zero_copy_batch=True
    )
    for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from (json.loads(part) for part in pa.table(batch)["partial"].to_pylist())


def _add(counts: Counts, more: dict[str, dict[str, float]]) -> None:
    for name, values in more.items():
        counts[name].update(values)


def _partial(**parts: Any) -> pa.Table:
    return pa.table({"partial": pa.array([json.dumps(parts)], pa.string())})


def _summarise_rows(rows: pa.Table, report: ReportConfig, policy: str, measure: str) -> pa.Table:
    rows = columns.conform(rows, columns.RECYCLED)
    counts: dict[str, dict[str, float]] = {
        "outcome": _value_counts(pc.fill_null(rows["outcome"], columns.ACTIVE)),
        "escaped": {"rows": pc.sum(rows["escaped"]).as_py() or 0},
        "kept": dict(kept_by_policy(rows, policy)),
        **{name: _value_counts(rows[name].drop_null()) for name in (*REFLECTIONS, *UNSCORED)},
    }
    recycled = rows.filter(pc.is_in(rows["outcome"], pa.array(columns.RECYCLED_OUTCOMES)))
    for name, sides in LENGTHS.items():
        for side, column in zip(("before", "after"), sides, strict=True):
            words = pc.count_substring_regex(pc.fill_null(recycled[column], ""), r"\S+")
            counts[f"{name}_{side}"] = _value_counts(words)
    scored: dict[str, dict[str, float]] = {"score_sum": {}, "scored": {}, "unscored": {}}
    for name, text in SCORED_TEXTS.items():
        with_text = recycled.filter(pc.is_valid(recycled[text]))
        values = pc.fill_null(with_text[name], math.nan).to_numpy()
        finite = values[np.isfinite(values)]
        bins = np.maximum(np.searchsorted(SCORE_EDGES[measure], finite, side="right") - 1, 0)
        counts[name] = {str(bin_): int(count) for bin_, count in zip(*np.unique(bins, return_counts=True), strict=True)}
        scored["score_sum"][name] = float(finite.sum())
        scored["scored"][name] = len(finite)
        scored["unscored"][name] = len(values) - len(finite)
    pairs = draw_pairs(recycled, report.num_pairs, report.max_chars, report.seed)
    return _partial(counts=counts | scored, pairs=pairs)


def _value_counts(values: pa.ChunkedArray) -> dict[str, float]:
    return {str(entry["values"]): entry["counts"] for entry in pc.value_counts(values).to_pylist()}


def _summarise_packs(packs: pa.Table) -> pa.Table:
    packs = columns.conform(packs, columns.PACKS)
    is_pack = pc.fill_null(pc.equal(packs["outcome"], columns.PACKED), False)
    packed, unpacked = packs.filter(is_pack), packs.filter(pc.invert(is_pack))
    document_tokens = pc.list_flatten(packed["document_lengths"])
    ids = pc.list_flatten(packed["row_ids"]).to_pylist()
    total = {
        "packs": packed.num_rows,
        "documents": len(ids),
        "tokens": pc.sum(document_tokens).as_py() or 0,
        "rows": sum(map(is_first_part, ids)),
        "general_rows": sum(is_first_part(row_id) and is_general(row_id) for row_id in ids),
        "supervised_tokens": pc.sum(pc.not_equal(pc.list_flatten(packed["labels"]), -100)).as_py() or 0,
        **{name: pc.sum(packed[name]).as_py() or 0 for name in ("cut_rows", "lost_tokens")},
    }
    reasons: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}  # of recycled rows, and of general data
    for reason, row_ids in zip(unpacked["outcome"].to_pylist(), unpacked["row_ids"].to_pylist(), strict=True):
        for row_id in row_ids or []:
            reasons[is_general(row_id)][reason or "unknown"] += 1
    slots = _value_counts(pc.list_value_length(packed["input_ids"]))
    counts = {"total": total, "unpacked": reasons[False], "general_unpacked": reasons[True], "pack_slots": slots}
    return _partial(counts=counts | {"document_tokens": _value_counts(document_tokens)})


def _rows(outcomes: Counter[str], escaped: Counter[str], packed: Counts | None) -> RowCounts:
    def by_reason(kind: str) -> dict[str, int]:
        prefix = f"{kind}:"
        return {name.removeprefix(prefix): n for name, n in outcomes.most_common() if name.startswith(prefix)}

    quarantined, dropped = by_reason("quarantined"), by_reason("dropped")
    recycled = {outcome: outcomes[outcome] for outcome in columns.RECYCLED_OUTCOMES}
    ended = sum(quarantined.values()) + sum(dropped.values()) + sum(recycled.values())
    return RowCounts(
        source=outcomes.total(),
        quarantined=quarantined,
        dropped=dropped,
        recycled=recycled,
        active=outcomes.total() - ended,
        escaped=escaped["rows"],
        packed=packed["total"]["rows"] - packed["total"]["general_rows"] if packed else 0,
        unpacked=dict(packed["unpacked"].most_common()) if packed else {},
    )


def _lengths(counts: Counts, name: str) -> LengthCounts:
    before, after = counts[f"{name}_before"], counts[f"{name}_after"]
    return LengthCounts(
        unit="words",
        edges=list(WORD_EDGES),
        before=bin_counts(before, WORD_EDGES),
        median_before=median_of_counts(before),
        after=bin_counts(after, WORD_EDGES),
        median_after=median_of_counts(after),
    )


def median_of_counts(counts: Counter[str]) -> float | None:
    """The exact median of values given as value -> count; None if there are none."""
    values = sorted((float(value), count) for value, count in counts.items())
    total = counts.total()
    if not total:
        return None
    ranks = Counter(((total - 1) // 2, total // 2))
    found, seen = 0.0, 0
    for value, count in values:
        found += value * sum(n for rank, n in ranks.items() if seen <= rank < seen + count)
        seen += count
    return found / 2


def _scores(counts: Counts, name: str, measure: str) -> ScoreCounts:
    scored, edges = counts["scored"][name], SCORE_EDGES[measure]
    bins = [counts[name][str(bin_)] for bin_ in range(len(edges))]
    prefix, _, text = name.partition("_")
    reasons: Counter[str] = Counter()
    for entry, count in counts[f"{prefix}_unscored"].items():
        reasons.update(
            {part.removeprefix(f"{text}:"): count for part in entry.split(",") if part.startswith(f"{text}:")}
        )
    return ScoreCounts(
        measure=measure,
        edges=list(edges),
        counts=bins,
        scored=scored,
        unscored=counts["unscored"][name],
        unscored_reasons=dict(reasons.most_common()),
        below_one=sum(bins[: edges.index(1)]) if measure == RATIO else None,
        mean=counts["score_sum"][name] / scored if scored else None,
    )


def _packing(packed: Counts) -> PackCounts:
    tokens = packed["document_tokens"]
    return PackCounts(
        **{name: packed["total"][name] for name in _OF_PACKING},
        general_unpacked=dict(packed["general_unpacked"].most_common()),
        longest_pack=max((int(length) for length in packed["pack_slots"]), default=0),
        document_tokens=TokenCounts(
            "tokens", list(WORD_EDGES), bin_counts(tokens, WORD_EDGES), median_of_counts(tokens)
        ),
    )
