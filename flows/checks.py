"""Blocking checks of the assets: each runs after its asset was made, and a failure stops everything downstream.

An asset that fails a check counts as unfinished, so the next run makes it again.
"""

from collections.abc import Sequence

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from cluster.manifest import Manifest
from flows.graph import PACKED_SEQUENCES, PARTITION_TAG, RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS, STAGES
from flows.run import Run
from flows.staleness import refresh_of as refresh_of_input
from flows.taken_files import TAKEN_OUT
from operators.columns import ACTIVE, PACKED, RECYCLED_OUTCOMES
from operators.join import ROWS_PER_PARTITION, add_up, group_by_key
from operators.read.drop_seen import SEEN
from operators.read.read_instructions import DUPLICATE
from operators.read.source_files import shown

SURVIVAL_CHECK = "some_row_survives"


def refresh_of(context: dg.AssetCheckExecutionContext) -> str:
    """The refresh that the current run makes."""
    return context.run.tags[PARTITION_TAG]


@dg.asset_check(asset=RAW_INSTRUCTIONS, name=SURVIVAL_CHECK, blocking=True)
def some_row_survives(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """At least one record of the source can be recycled, in this refresh or in an earlier one."""
    refresh = refresh_of(context)
    made = _manifest(run, RAW_INSTRUCTIONS, refresh)
    outcomes = made.outcomes
    lost = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "no records"
    passed = may_go_on(made)
    message = f"raw_instructions: no row of {shown(run.config.source.path)} survives ({lost})"
    return _result(run, RAW_INSTRUCTIONS, refresh, passed, message)


def may_go_on(made: Manifest) -> bool:
    """Whether raw instructions have a row to recycle, or lack one for a reason that is not an error of the source."""
    taken_out = TAKEN_OUT in made.made_from or made.made_from.get("files") == []  # on purpose
    return made.outcomes.get(ACTIVE, 0) > 0 or SEEN in made.outcomes or taken_out


def _conserved(stage: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=stage, name="rows_are_conserved", blocking=True)
    def rows_are_conserved(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
        """The rows that the stage read came out, each once, and no row lost its outcome."""
        refresh = refresh_of(context)
        before = _manifest(run, RAW_INSTRUCTIONS, refresh)
        after = _manifest(run, stage, refresh)
        left = {name: count for name, count in before.outcomes.items() if name != ACTIVE}
        same = all(after.outcomes.get(name, 0) >= count for name, count in left.items())
        same_ids = before.ids == after.ids
        counts = f"{after.rows} rows out against {before.rows} read"
        others = "" if same_ids else ", and they are not the same rows"
        message = f"{stage}: {counts}{others}; outcomes {after.outcomes}"
        return _result(run, stage, refresh, same and same_ids and before.rows == after.rows, message)

    return rows_are_conserved


@dg.asset_check(asset=RECYCLED_INSTRUCTIONS, blocking=True)
def every_row_has_an_outcome(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """No row is still active, and every outcome is one of the known kinds."""
    refresh = refresh_of(context)
    strange = [name for name in _manifest(run, RECYCLED_INSTRUCTIONS, refresh).outcomes if not _is_final(name)]
    message = f"recycled_instructions: outcomes {strange} are not final"
    return _result(run, RECYCLED_INSTRUCTIONS, refresh, not strange, message)


@dg.asset_check(asset=PACKED_SEQUENCES, blocking=True)
def every_recycled_row_is_packed_or_quarantined(run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """The number of ids in packs and quarantine is the number of recycled rows of the refreshes to be packed."""
    packs = _manifest(run, PACKED_SEQUENCES)
    finished = [_manifest(run, STAGES[-1], refresh_of_input(name)) for name in packs.made_from.get("inputs", {})]
    recycled = sum(manifest.outcomes.get(outcome, 0) for manifest in finished for outcome in RECYCLED_OUTCOMES)
    rows, general = (packs.metrics.get(name, 0) for name in ("rows", "general_rows"))
    packed = int(rows) - int(general)  # type: ignore[arg-type]
    message = f"packed_sequences: {packed} rows in packs and quarantine against {recycled} recycled"
    return _result(run, PACKED_SEQUENCES, None, packed == recycled, message)


@dg.asset_check(asset=PACKED_SEQUENCES, blocking=True)
def every_row_lives_in_one_refresh(run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """Over all refreshes, a row that one refresh dropped as seen is kept by another, and no row is kept by two.

    The check runs only if this run made raw instructions or packs, because nothing else changes the result.
    """
    refreshes = run.store.refreshes(RAW_INSTRUCTIONS)
    made = {asset for asset, _ in run.store.made}
    if len(refreshes) < 2 or not made & {RAW_INSTRUCTIONS, PACKED_SEQUENCES}:
        return dg.AssetCheckResult(passed=True)
    lost, doubled = count_homeless(run.store.rows(RAW_INSTRUCTIONS, refreshes), _num_rows(run, refreshes))
    stale = [key for key in refreshes if run.staleness.is_stale(RAW_INSTRUCTIONS, key)] or refreshes
    again = ", ".join(f"--refresh {key}" for key in stale)
    message = (
        f"raw_instructions: over all refreshes {lost} rows are kept by none and {doubled} by more than one; "
        f"make again, in this order: {again}"
    )
    return _result(run, PACKED_SEQUENCES, None, not lost and not doubled, message)


@dg.asset_check(asset=PACKED_SEQUENCES, blocking=True)
def something_can_be_trained_on(run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """There is at least one pack."""
    outcomes = _manifest(run, PACKED_SEQUENCES).outcomes
    message = f"packed_sequences: no pack, only {outcomes}"
    return _result(run, PACKED_SEQUENCES, None, outcomes.get(PACKED, 0) > 0, message)


def count_homeless(raw: Dataset, num_rows: int) -> tuple[int, int]:
    """The number of rows that were dropped as seen and that no refresh keeps, and of rows that more than one keeps.

    Columns in: row_id, outcome, of the raw instructions of all refreshes.
    """
    ids = raw.select_columns(["row_id", "outcome"])
    together = group_by_key(ids, "row_id", 1 + num_rows // ROWS_PER_PARTITION)
    sums = add_up(together.map_batches(_homeless, batch_size=None, batch_format="pyarrow"), ["lost", "doubled"])
    return sums["lost"], sums["doubled"]


def _homeless(rows: pa.Table) -> pa.Table:
    """Within one partition, which holds all rows of an id."""
    if not rows.num_rows:  # the shuffle may give a block no columns at all
        return pa.table({"lost": [0], "doubled": [0]})
    seen = pc.equal(rows["outcome"], SEEN)
    nameless = pc.or_(pc.starts_with(rows["outcome"], "quarantined:"), pc.equal(rows["outcome"], DUPLICATE))
    kept = pc.invert(pc.or_(seen, nameless))
    marked = pa.table({"row_id": rows["row_id"], "seen": seen.cast(pa.int64()), "kept": kept.cast(pa.int64())})
    sums = marked.group_by("row_id").aggregate([("seen", "sum"), ("kept", "sum")])
    lost = pc.and_(pc.greater(sums["seen_sum"], 0), pc.equal(sums["kept_sum"], 0))
    doubled = pc.greater(sums["kept_sum"], 1)
    return pa.table({"lost": [pc.sum(lost).as_py() or 0], "doubled": [pc.sum(doubled).as_py() or 0]})


def _num_rows(run: Run, refreshes: Sequence[str]) -> int:
    return sum(_manifest(run, RAW_INSTRUCTIONS, key).rows or 0 for key in refreshes)


def _manifest(run: Run, asset: str, refresh: str | None = None) -> Manifest:
    return run.store.manifest(asset, refresh) or Manifest(fingerprint="")


def _result(run: Run, asset: str, refresh: str | None, passed: bool, message: str) -> dg.AssetCheckResult:
    if not passed:
        run.store.invalidate(asset, refresh)
    return dg.AssetCheckResult(passed=passed, metadata={"message": message})


def _is_final(outcome: str) -> bool:
    return outcome in RECYCLED_OUTCOMES or outcome.startswith(("quarantined:", "dropped:"))


CHECKS = [
    some_row_survives,
    *(_conserved(stage) for stage in STAGES),
    every_row_has_an_outcome,
    every_recycled_row_is_packed_or_quarantined,
    every_row_lives_in_one_refresh,
    something_can_be_trained_on,
]
