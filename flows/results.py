"""Collects the numbers of a run's report from the storage."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from cluster.manifest import Manifest
from flows.graph import PACKED_SEQUENCES, RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.run import Run
from flows.training_start import GENERAL_OUTCOMES
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, Release
from operators.files.atomic import open_filesystem
from operators.report.report import Results
from operators.report.stages import StageSummary

UNUSED_COLUMNS = "ignored_columns"  # a metric of raw_instructions: column -> rows in which it is not empty


def results_of(run: Run, student: Mapping[str, Any], evaluation: Evaluation, release: Release) -> Results:
    """Everything that the report shows in addition to the rows."""
    return Results(
        stages=stage_summaries(run),
        student=student,
        evaluation=evaluation,
        release=release,
        decisions=ReleaseHistory(run.config.storage).decisions(),
        costs=run.costs(),
        unused_columns=unused_columns(run),
        general=_counted(run.store.manifest(PACKED_SEQUENCES), GENERAL_OUTCOMES),
        earlier=_earlier(run),
    )


def unused_columns(run: Run) -> dict[str, int]:
    """Columns of the source that nothing reads, and in how many rows of all refreshes they are not empty."""
    counted: Counter[str] = Counter()
    for refresh in run.store.refreshes(RAW_INSTRUCTIONS):
        manifest = run.store.manifest(RAW_INSTRUCTIONS, refresh)
        counted.update(_counted(manifest, UNUSED_COLUMNS))
    return dict(counted.most_common())


def _counted(manifest: Manifest | None, name: str) -> Mapping[str, int]:
    """A metric that holds counts by name; empty if there is none."""
    found = manifest.metrics.get(name) if manifest else None
    return found if isinstance(found, dict) else {}


def stage_summaries(run: Run) -> list[StageSummary]:
    """Each finished asset in the order of the graph, summed over the refreshes that were recycled."""
    recycled = run.store.refreshes(RECYCLED_INSTRUCTIONS)
    summaries: dict[str, StageSummary] = {}
    for asset, spec in run.specs.items():
        refreshes: list[str | None] = [*recycled] if run.store.refreshes(asset) else [None]
        manifests = [manifest for key in refreshes if (manifest := run.store.manifest(asset, key))]
        if manifests:
            cached = not run.store.made & {(asset, key) for key in refreshes}
            parents = [dep.asset_key.to_user_string() for dep in spec.deps]
            read = [summaries[name].rows_out for name in parents if name in summaries]
            counted = [rows for rows in read if rows is not None]
            rows_in = sum(counted) if counted else None
            summaries[asset] = _summary(asset, manifests, rows_in, cached=cached)
    return list(summaries.values())


def _summary(asset: str, manifests: list[Manifest], rows_in: int | None, *, cached: bool) -> StageSummary:
    outcomes: Counter[str] = Counter()
    metrics: Counter[str] = Counter()
    for manifest in manifests:
        outcomes.update(manifest.outcomes)
        metrics.update({name: value for name, value in manifest.metrics.items() if not isinstance(value, dict)})
    seconds = sum(manifest.seconds for manifest in manifests)
    has_rows = manifests[0].rows is not None
    return StageSummary(
        asset=asset,
        seconds=seconds,
        rows_in=rows_in,
        rows_out=sum(manifest.rows or 0 for manifest in manifests) if has_rows else None,
        outcomes=dict(outcomes),
        cached=cached,
        teacher={**metrics, "seconds": seconds} if "calls" in metrics else {},
        peak_memory_mib=max(manifest.peak_memory_mib for manifest in manifests),
    )


def _earlier(run: Run) -> dict[str, Any] | None:
    """The figures of the run's last report; None if there is none that can be read."""
    filesystem, path = open_filesystem(run.path("reports", f"{run.config.name}.json"))
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return None
    with filesystem.open_input_stream(path) as stream:
        try:
            figures: dict[str, Any] = json.loads(stream.read())
        except ValueError:
            return None
    return figures
