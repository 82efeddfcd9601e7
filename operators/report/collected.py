"""The report's counts of rows and packs, before they are joined with the results of the stages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows by outcome; `active` rows have no outcome yet, `escaped` rows contained chat markup."""

    source: int
    quarantined: Mapping[str, int]
    dropped: Mapping[str, int]
    recycled: Mapping[str, int]
    active: int
    escaped: int
    packed: int
    unpacked: Mapping[str, int]


@dataclass(frozen=True)
class LengthCounts:
    """Texts by their number of words, before and after; a bin is [edge, next edge)."""

    unit: str
    edges: Sequence[int]
    before: Sequence[int]
    median_before: float | None
    after: Sequence[int]
    median_after: float | None


@dataclass(frozen=True)
class ScoreCounts:
    """Texts by their score. `below_one` is null unless the scores are ratios; `mean` is null if nothing was scored."""

    measure: str
    edges: Sequence[float]
    counts: Sequence[int]
    scored: int
    unscored: int
    unscored_reasons: Mapping[str, int]
    below_one: int | None
    mean: float | None


@dataclass(frozen=True)
class TokenCounts:
    """Packed examples by their number of tokens."""

    unit: str
    edges: Sequence[int]
    counts: Sequence[int]
    median: float | None


@dataclass(frozen=True)
class PackCounts:
    """Counts of what the packs hold; `lost_tokens` were cut off from `cut_rows` rows.

    `rows` includes `general_rows`, those of general data; `general_unpacked` are others of it, by reason.
    """

    packs: int
    documents: int
    rows: int
    general_rows: int
    tokens: int
    supervised_tokens: int
    cut_rows: int
    lost_tokens: int
    longest_pack: int
    general_unpacked: Mapping[str, int]
    document_tokens: TokenCounts


@dataclass(frozen=True)
class Collected:
    """All counts; `packing` is None if nothing was packed, `pairs` are sampled rows with their texts cut."""

    rows: RowCounts
    lengths: Mapping[str, LengthCounts]
    scores: Mapping[str, ScoreCounts]
    reflections: Mapping[str, Mapping[str, int]]
    policies: Mapping[str, Any]
    packing: PackCounts | None
    pairs: Sequence[Mapping[str, Any]]

    def as_figures(self) -> dict[str, Any]:
        """The counts as in reports/<run>.json; without packs, `packing` is empty there."""
        return asdict(self) | {"packing": asdict(self.packing) if self.packing else {}}
