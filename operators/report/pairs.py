"""The before/after pairs that a report shows: sampled by hash, cut to a length, with parsed critiques."""

import hashlib
import heapq
import json
import math
from typing import Any

import pyarrow as pa

from operators import columns

SCORES = ("ifd_original", "ifd_better_instruction", "rifd_selected", "rifd_better_response")
REFLECTIONS = ("instruction_reflection", "response_reflection")
TEXTS = ("instruction", "input", "response", "final_instruction", "final_response")
CRITIQUES = ("instruction_critique", "response_critique")
MAX_CRITERIA = 20

# (hash, row id, pair); sorts by hash, then by row id.
Draw = tuple[str, str, dict[str, Any]]


def draw_pairs(recycled: pa.Table, num_pairs: int, max_chars: int, seed: int) -> dict[str, list[Draw]]:
    """The rows of lowest seeded hash by outcome: the same rows for any blocks in any order."""
    outcomes = recycled["outcome"].to_pylist()
    hashes = [_draw(row_id, seed) for row_id in recycled["row_id"].to_pylist()]
    drawn: dict[str, list[Draw]] = {}
    for outcome in columns.RECYCLED_OUTCOMES:
        mine = (row for row, name in enumerate(outcomes) if name == outcome)
        lowest = heapq.nsmallest(num_pairs, mine, key=hashes.__getitem__)
        pairs = [_cut_pair(pair, max_chars) for pair in recycled.take(pa.array(lowest, pa.int64())).to_pylist()]
        drawn[outcome] = [(hashes[row], pair["row_id"], pair) for row, pair in zip(lowest, pairs, strict=True)]
    return drawn


def _draw(row_id: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).hexdigest()


def _cut_pair(row: dict[str, Any], max_chars: int) -> dict[str, Any]:
    pair = {name: row[name] for name in ("row_id", "origin", "outcome", *REFLECTIONS)}
    pair |= {name: _finite(row[name]) for name in SCORES}
    pair |= {name: cut_text(row[name] or "", max_chars) for name in TEXTS}
    return pair | {name: cut_critique(row[name], max_chars) for name in CRITIQUES}


def cut_text(text: str, max_chars: int) -> dict[str, Any]:
    """The beginning of a text, and the number of characters of the whole text."""
    return {"text": text[:max_chars], "num_chars": len(text)}


def cut_critique(critique: str | None, max_chars: int) -> dict[str, dict[str, Any]]:
    """Criterion -> cut sentence; a critique that is not a JSON object is shown as one criterion without a name."""
    if not critique:
        return {}
    try:
        parsed = json.loads(critique)
    except json.JSONDecodeError:
        parsed = critique
    named = parsed if isinstance(parsed, dict) else {"critique": parsed}
    return {
        str(name)[:100]: cut_text(str(sentence), max_chars) for name, sentence in list(named.items())[:MAX_CRITERIA]
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def lowest(draws: list[Draw], num_pairs: int) -> list[Draw]:
    """The lowest draws of several blocks: the same as if all rows were in one block."""
    return heapq.nsmallest(num_pairs, draws, key=lambda draw: tuple(draw[:2]))
