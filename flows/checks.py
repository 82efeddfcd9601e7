"""What must be true of the assets: checked after each is made, and a failure stops everything downstream."""

from collections.abc import Mapping

import dagster as dg

from flows.graph import (
    INSTRUCTION_REFLECTIONS,
    PACKED_SEQUENCES,
    PARTITION_TAG,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    RESPONSE_REFLECTIONS,
    SELECTED_INSTRUCTIONS,
)
from flows.run import Run
from operators.columns import ACTIVE, PACKED, RECYCLED_OUTCOMES

SURVIVAL_CHECK = "some_row_survives"
STAGES = (INSTRUCTION_REFLECTIONS, SELECTED_INSTRUCTIONS, RESPONSE_REFLECTIONS, RECYCLED_INSTRUCTIONS)


def refresh_of(context: dg.AssetCheckExecutionContext) -> str:
    """The refresh that the current run makes."""
    return context.run.tags[PARTITION_TAG]


@dg.asset_check(asset=RAW_INSTRUCTIONS, name=SURVIVAL_CHECK, blocking=True)
def some_row_survives(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """At least one record of the source can be recycled, in this refresh or in an earlier one."""
    manifest = run.store.manifest(RAW_INSTRUCTIONS, refresh_of(context)) or {}
    outcomes: Mapping[str, int] = manifest.get("outcomes", {})
    seen = any(outcome.startswith("dropped:seen") for outcome in outcomes)
    lost = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "no records"
    return dg.AssetCheckResult(
        passed=outcomes.get(ACTIVE, 0) > 0 or seen,
        metadata={"message": f"raw_instructions: no row of {run.config.source.path} survives ({lost})"},
    )


def _conserved(stage: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=stage, name="rows_are_conserved", blocking=True)
    def rows_are_conserved(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
        """The rows that were read came out, each once, and none lost the outcome that it had."""
        refresh = refresh_of(context)
        before = run.store.manifest(RAW_INSTRUCTIONS, refresh) or {}
        after = run.store.manifest(stage, refresh) or {}
        left = {name: count for name, count in before.get("outcomes", {}).items() if name != ACTIVE}
        same = all(after.get("outcomes", {}).get(name, 0) >= count for name, count in left.items())
        same_ids = before.get("ids", after.get("ids")) == after.get("ids")
        conserved = same and same_ids and before.get("rows") == after.get("rows")
        counts = f"{after.get('rows')} rows out against {before.get('rows')} read"
        others = "" if same_ids else ", and they are not the same rows"
        message = f"{stage}: {counts}{others}; outcomes {after.get('outcomes')}"
        return dg.AssetCheckResult(passed=conserved, metadata={"message": message})

    return rows_are_conserved


@dg.asset_check(asset=RECYCLED_INSTRUCTIONS, blocking=True)
def every_row_has_an_outcome(context: dg.AssetCheckExecutionContext, run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """No row is still active, and every outcome is one of the known kinds."""
    outcomes = (run.store.manifest(RECYCLED_INSTRUCTIONS, refresh_of(context)) or {}).get("outcomes", {})
    strange = [name for name in outcomes if not _is_final(name)]
    return dg.AssetCheckResult(
        passed=not strange, metadata={"message": f"recycled_instructions: outcomes {strange} are not final"}
    )


@dg.asset_check(asset=PACKED_SEQUENCES, blocking=True)
def every_recycled_row_is_packed_or_quarantined(run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """The ids in packs and quarantine are as many as the recycled rows of all refreshes."""
    finished = [run.store.manifest(STAGES[-1], key) or {} for key in run.store.refreshes(STAGES[-1])]
    recycled = sum(manifest["outcomes"].get(outcome, 0) for manifest in finished for outcome in RECYCLED_OUTCOMES)
    metrics = (run.store.manifest(PACKED_SEQUENCES) or {}).get("metrics", {})
    message = f"packed_sequences: {metrics.get('rows')} rows in packs and quarantine against {recycled} recycled"
    return dg.AssetCheckResult(passed=metrics.get("rows") == recycled, metadata={"message": message})


@dg.asset_check(asset=PACKED_SEQUENCES, blocking=True)
def something_can_be_trained_on(run: dg.ResourceParam[Run]) -> dg.AssetCheckResult:
    """There is at least one pack."""
    outcomes = (run.store.manifest(PACKED_SEQUENCES) or {}).get("outcomes", {})
    return dg.AssetCheckResult(
        passed=outcomes.get(PACKED, 0) > 0, metadata={"message": f"packed_sequences: no pack, only {outcomes}"}
    )


def _is_final(outcome: str) -> bool:
    return outcome in RECYCLED_OUTCOMES or outcome.startswith(("quarantined:", "dropped:"))


CHECKS = [
    some_row_survives,
    *(_conserved(stage) for stage in STAGES),
    every_row_has_an_outcome,
    every_recycled_row_is_packed_or_quarantined,
    something_can_be_trained_on,
]
