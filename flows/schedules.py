"""Recurring refreshes: a schedule and a sensor look for new source files and request a run that takes them.

The files determine the name of a refresh, so sensor and schedule request the same refresh if they see the same files.
Only one run works at a time, and no run is requested while one is queued or running: files that arrive meanwhile make
the next refresh. A failed refresh is requested again (`flows.retries`). A file is taken when it has not changed for
`schedule.settle_seconds`. To be safe with slower copies, write the file outside the source, or with a name that begins
with `.` or `_`, and rename it.
"""
# No `from __future__ import annotations` here: Dagster reads the annotations.

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from cluster.files import StorageError
from cluster.lease import StorageBusyError, is_leased, lease
from cluster.refresh_key import require_refresh_key
from cluster.runtime import connected
from cluster.storage import AssetStore
from cluster.storage_mark import require_storage
from flows.asset_io import AssetIO
from flows.config import RunConfig, config_of_environment
from flows.graph import PARTITION_TAG, RAW_INSTRUCTIONS, Graph, Specs
from flows.preflight import preflight, require_sound
from flows.refresh_requests import Request
from flows.remake import assets_by_refresh
from flows.retries import BUSY_TAG, UNFINISHED_RUNS, Decided, decide, is_broken_off
from flows.run import MOST_NAMED, Run, open_run
from flows.source_versions import RefreshFile
from flows.troubles import alert_once, words_of_trouble
from operators.json_lines import JsonLines, json_is_asked_for
from operators.progress import ProgressLines
from operators.read.source_files import shown

JOB = "refresh_and_retrain"


def definitions(graph: Graph) -> dg.Definitions:
    """What Dagster's web server and daemon serve: the graph, its checks, one job, a schedule and a sensor.

    Raises:
        ConfigError: the configuration that the environment names cannot be used.
    """
    config = config_of_environment()
    job = dg.define_asset_job(JOB, selection=dg.AssetSelection.all(), executor_def=dg.in_process_executor)
    return dg.Definitions(
        assets=graph.assets,
        asset_checks=graph.checks,
        jobs=[job],
        schedules=[new_data_schedule(config, graph)],
        sensors=[new_data_sensor(config, graph)],
        resources={"run": run_resource(graph.specs), "io_manager": io_of_run},
        executor=dg.in_process_executor,
    )


def new_data_sensor(config: RunConfig, graph: Graph) -> dg.SensorDefinition:
    """Looks every `schedule.sensor_seconds`."""
    status = dg.DefaultSensorStatus.RUNNING if config.schedule.active else dg.DefaultSensorStatus.STOPPED

    @dg.sensor(
        name="new_data", job_name=JOB, minimum_interval_seconds=config.schedule.sensor_seconds, default_status=status
    )
    def new_data_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        """Requests a refresh as soon as the source has new files."""
        found = wanted_runs(context.instance, _look(config, graph.specs))
        if isinstance(found, dg.SkipReason):
            return found
        keys = [str(request.partition_key) for request in found]
        return dg.SensorResult(
            run_requests=found, dynamic_partitions_requests=[graph.refreshes.build_add_request(keys)]
        )

    return new_data_sensor


def new_data_schedule(config: RunConfig, graph: Graph) -> dg.ScheduleDefinition:
    """Looks at the times of `schedule.cron`, UTC."""
    status = dg.DefaultScheduleStatus.RUNNING if config.schedule.active else dg.DefaultScheduleStatus.STOPPED

    @dg.schedule(name="refresh", job_name=JOB, cron_schedule=config.schedule.cron, default_status=status)
    def new_data_schedule(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        """Requests a refresh at fixed times, if the source has new files."""
        found = wanted_runs(context.instance, _look(config, graph.specs))
        if not isinstance(found, dg.SkipReason):
            keys = [str(request.partition_key) for request in found]
            context.instance.add_dynamic_partitions(str(graph.refreshes.name), keys)
        return found

    return new_data_schedule


def wanted_runs(instance: dg.DagsterInstance, run: Run) -> list[dg.RunRequest] | dg.SkipReason:
    """The runs to launch now, or why there is nothing to launch.

    New files become a request, which stays until the refresh is finished or given up (`flows.retries`). If there is new
    data, earlier refreshes whose rows were not recycled to the end run first; otherwise the student would be trained
    without them. What cannot be read, in the source or in the storage, stops no other refresh, and is alerted once.
    """
    active = instance.get_runs(dg.RunsFilter(statuses=UNFINISHED_RUNS), limit=1)
    if active:
        return dg.SkipReason(f"{_named(active[0])} is {active[0].status.value}; new files wait for its end")
    nothing_new, decided, troubles = "", Decided(), list[str]()
    try:
        require_mounted(run)
        if is_leased(run.config.storage):
            return dg.SkipReason("a run of the command line is writing to the storage; new files wait for its end")
        troubles += run.requests.damaged()  # first, because a new request for the same files replaces such a file
        with run.store.looking():
            try:
                nothing_new = request_new_files(run, troubles)
            except OSError as error:  # the source is out of reach; refreshes whose rows are stored go on
                words = words_of_trouble(error, run.config.source.path)
                troubles.append(f"source.path: {words.removeprefix('storage: ')}")
            decided = decide(instance, run)
    except (StorageError, OSError) as error:
        troubles.append(words_of_trouble(error, run.config.storage))
    troubles += decided.troubles
    alert_once(instance, run, troubles)
    if decided.due:
        return _trained_once(run, decided.due)
    reasons = [*troubles, *decided.waiting, nothing_new, *decided.given_up]
    return dg.SkipReason("; ".join(dict.fromkeys(filter(None, reasons))))


def _trained_once(run: Run, due: Sequence[dg.RunRequest]) -> list[dg.RunRequest]:
    """The requests, of which only the last, which runs last, makes what is made over all refreshes.

    A training for each would only make students that the next one replaces.
    """
    of_refresh, _ = assets_by_refresh(run)
    own = [dg.AssetKey(name) for name in of_refresh]
    return [*(request.with_replaced_attrs(asset_selection=own) for request in due[:-1]), due[-1]]


def require_mounted(run: Run) -> None:
    """Refuse a storage that is not there, if `schedule.existing_storage` says that it has to be.

    Raises:
        StorageError: it names the storage and the cure.
    """
    if run.config.schedule.existing_storage:
        require_storage(run.config.storage)


def request_new_files(run: Run, troubles: list[str] | None = None) -> str:
    """Store a request for the files that no refresh has; returns "" or the reason why there is no request.

    Args:
        run: a fresh look at source and storage.
        troubles: gets one line for each refresh that cannot be read.

    Raises:
        OSError: the source cannot be reached.
        StorageError: a manifest that tells which files were taken cannot be read.
    """
    try:
        new = run.staleness.files.files_of(None)
    except ValueError as error:  # no file at all
        return str(error)
    if not new:
        unreadable = run.staleness.files.unreadable()
        return (
            f"source.path: {shown(run.config.source.path)} has no file that no refresh has taken and that is older "
            f"than {run.config.schedule.settle_seconds:g} s"
        ) + (f"; cannot be read: {', '.join(unreadable[:MOST_NAMED])}" if unreadable else "")
    asked_for = {request.key for request in run.requests.all()}
    for broken in _broken_off(run.store, [] if troubles is None else troubles):
        if broken not in asked_for:
            run.requests.put(Request(key=broken))
    run.requests.put(Request(key=refresh_key(new), files=tuple((file.name, file.identity) for file in new)))
    return ""


def refresh_key(files: Sequence[RefreshFile]) -> str:
    """The name for these files, always the same: the day of the newest file (UTC) and a hash of names and contents."""
    named = sorted((file.name, file.identity) for file in files)
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:8]
    newest = max((file.changed for file in files if file.changed is not None), default=None)
    return require_refresh_key(digest if newest is None else f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d}-{digest}")


def run_resource(specs: Specs) -> dg.ResourceDefinition:
    """The `run` of a process that Dagster launched; the command line passes its own `Run` instead."""

    @dg.resource
    def launched_run(context: dg.InitResourceContext) -> Iterator[Run]:
        """Holds the storage and the connection to Ray during the run."""
        run = _look(config_of_environment(), specs)
        require_mounted(run)
        run = _requested(run, context.run)
        about = {"run": context.run.run_id, "refresh": context.run.tags.get(PARTITION_TAG)} if context.run else {}
        lines: Any = JsonLines(sys.stderr, "info", **about) if json_is_asked_for() else sys.stderr
        with _lease_of(context, run), connected(), ProgressLines(lines):
            require_sound(preflight(run, *_wanted_of(context), holds_lease=True))
            run.tidy()
            yield run
            run.tidy()

    return launched_run


def _requested(run: Run, launched: dg.DagsterRun | None) -> Run:
    """The run without a wait for files to settle if its refresh was asked for: the request names their contents."""
    refresh = launched.tags.get(PARTITION_TAG, "") if launched else ""
    return open_run(run.config, run.specs) if refresh and run.requests.get(refresh) else run


@contextmanager
def _lease_of(context: dg.InitResourceContext, run: Run) -> Iterator[None]:
    """The storage's lease; a run that finds it taken gets a tag, so that it does not count as a failed attempt."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lease(run.config.storage, run.config.storage_lost_after_seconds))
        except StorageBusyError:
            if context.run is not None and context.instance is not None:
                context.instance.add_run_tags(context.run.run_id, {BUSY_TAG: "yes"})
            raise
        yield


@dg.io_manager(required_resource_keys={"run"})
def io_of_run(context: dg.InitResourceContext) -> AssetIO:
    """The IO manager of the same `Run` that the assets get."""
    run: Run = context.resources.run
    return run.asset_io()


def _wanted_of(context: dg.InitResourceContext) -> tuple[str, list[str]]:
    """Refresh and assets of the run that Dagster launched; an empty list means all assets.

    A run of assets over all refreshes has no refresh; it gets the key `base`, which has no effect.
    """
    if context.run is None:
        return "base", []
    chosen = sorted(key.to_user_string() for key in context.run.asset_selection or ())
    return str(context.run.tags.get(PARTITION_TAG, "base")), chosen


def _look(config: RunConfig, specs: Specs) -> Run:
    """A fresh look at source and storage."""
    return open_run(config, specs, config.schedule.settle_seconds)


def _broken_off(store: AssetStore, troubles: list[str]) -> list[str]:
    """Keys of refreshes that have rows to recycle and are unfinished; one that cannot be read is a trouble."""
    found = []
    for key in store.refreshes(RAW_INSTRUCTIONS):
        try:
            found += [key] if is_broken_off(store, key) else []
        except StorageError as error:
            troubles.append(str(error))
    return found


def _named(run: dg.DagsterRun) -> str:
    refresh = run.tags.get(PARTITION_TAG)
    return f"run {run.run_id[:8]}" + (f" of refresh {refresh}" if refresh else "")
