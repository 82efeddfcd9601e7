"""Decides which refreshes to run now: those never tried, and those whose wait after a failure is over.

The attempts are Dagster's runs of the refresh, so a killed driver counts like a failed one. A run that found the
storage busy does not count. After `schedule.max_attempts` failures, or after a person cancelled the run, the refresh is
given up: one alert is sent, no other refresh takes its files, and refreshes of other files continue.
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg

from cluster.alert import send_alert
from cluster.dagster_home import RETRIES_TAG, STORAGE_TAG
from cluster.files import StorageError
from cluster.storage import AssetStore
from flows.failures import failure_of
from flows.first_seen import FirstSeen
from flows.graph import PARTITION_TAG, RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.refresh_requests import GivenUp, Request
from flows.run import Run
from flows.troubles import words_of_trouble
from operators.columns import ACTIVE

BUSY_TAG = "recycle/storage_was_busy"  # tag of a run that ended because another run held the storage
UNFINISHED_RUNS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_ENDED = FirstSeen()


@dataclass
class Decided:
    """The result of a look at the requests.

    Attributes:
        due: runs to launch now.
        waiting: one line for each refresh that waits for its next attempt.
        given_up: one line for each refresh that a person must retry.
        troubles: one line for each refresh that cannot be decided about, because source or storage cannot be read.
    """

    due: list[dg.RunRequest] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


def decide(instance: dg.DagsterInstance, run: Run) -> Decided:
    """Decide about every request; removes finished ones, and gives up those that failed too often."""
    decided = Decided()
    requests = run.requests.all()
    for request in sorted(requests, key=lambda each: (bool(each.files), each.key)):  # unfinished refreshes first
        try:
            if is_pointless(run, request):
                run.requests.remove(request.key)
            else:
                _decide_one(instance, run, request, decided)
        except (StorageError, OSError) as error:
            words = words_of_trouble(error, run.config.source.path)
            decided.troubles.append(f"refresh {request.key} waits: {words}")
    return decided


def is_pointless(run: Run, request: Request) -> bool:
    """Whether no file of the request exists unchanged, and none was taken: changed files belong to another request."""
    if run.store.manifest(RAW_INSTRUCTIONS, request.key) is not None:
        return False
    try:
        return not run.staleness.files.files_of(request.key)
    except ValueError:  # the source has no file at all
        return True


def is_broken_off(store: AssetStore, refresh: str) -> bool:
    """Whether a refresh has rows to recycle and is unfinished."""
    made = store.manifest(RAW_INSTRUCTIONS, refresh)
    has_rows = made is not None and made.outcomes.get(ACTIVE, 0) > 0
    return has_rows and store.manifest(RECYCLED_INSTRUCTIONS, refresh) is None


def _decide_one(instance: dg.DagsterInstance, run: Run, request: Request, decided: Decided) -> None:
    limits = run.config.schedule
    records = [
        record
        for record in instance.get_run_records(dg.RunsFilter(tags={PARTITION_TAG: request.key}))
        if record.dagster_run.tags.get(STORAGE_TAG, run.config.storage) == run.config.storage
    ]
    for record in records:  # sensor and schedule may look at the same time: one sees the run that the other requested
        if record.dagster_run.status in UNFINISHED_RUNS:
            decided.waiting.append(f"refresh {request.key} is {record.dagster_run.status.value}")
            return
    new = [record for record in records if record.dagster_run.run_id not in request.forgiven]
    succeeded = [record for record in new if record.dagster_run.status == dg.DagsterRunStatus.SUCCESS]
    # A successful run of only some assets may have left the refresh unfinished.
    if succeeded and succeeded[0] is new[0] and not is_broken_off(run.store, request.key):
        run.requests.remove(request.key)
        return
    attempts = [record for record in new if record not in succeeded and BUSY_TAG not in record.dagster_run.tags]
    cancelled = bool(attempts) and attempts[0].dagster_run.status == dg.DagsterRunStatus.CANCELED
    if request.given_up is None and (cancelled or len(attempts) >= limits.max_attempts):
        reason = "a person cancelled it" if cancelled else failure_of(instance, attempts[0].dagster_run)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        runs = tuple(record.dagster_run.run_id for record in new)
        given_up = GivenUp(at=now, attempts=len(attempts), reason=reason, runs=runs)
        request = run.requests.put(request.model_copy(update={"given_up": given_up}))
    if request.given_up is not None:
        request = _alerted(run, request, request.given_up)
        if request.given_up is not None:
            decided.given_up.append(describe(request))
        return
    wait = _seconds_to_wait(attempts[0], len(attempts), run) if attempts else 0.0
    if wait > 0:
        decided.waiting.append(
            f"refresh {request.key} failed {len(attempts)} of {limits.max_attempts} times, next attempt in {wait:.0f} s"
        )
        return
    run_key = request.key if not records else f"{request.key}#{len(records) + 1}"
    decided.due.append(dg.RunRequest(run_key=run_key, partition_key=request.key, tags=tags_of(run)))


def tags_of(run: Run) -> dict[str, str]:
    """Tags of a run that this module requests: its storage, and that Dagster itself does not retry it."""
    return {STORAGE_TAG: run.config.storage, RETRIES_TAG: "0"}


def describe(request: Request) -> str:
    """A given-up refresh in one line."""
    assert request.given_up is not None, request.key  # noqa: S101 - the callers have checked
    undelivered = "; the alert was not delivered: " + ", ".join(request.given_up.alert_errors)
    return (
        f"refresh {request.key} was given up after {request.given_up.attempts} attempts: {request.given_up.reason}"
        f"{undelivered if request.given_up.alert_errors else ''}"
    )


def _seconds_to_wait(last: dg.RunRecord, failures: int, run: Run) -> float:
    """Seconds until the next attempt: the wait starts at the end of the last run, and doubles with each failure.

    If the clock was set back, the wait is at most as long as if it started when this process first saw the end.
    """
    limits = run.config.schedule
    pause: float = min(limits.retry_seconds * 2.0 ** min(failures - 1, 30), limits.retry_max_seconds)
    elapsed = max(time.time() - (last.end_time or 0.0), _ENDED.seconds(last.dagster_run.run_id))
    return max(0.0, pause - elapsed)


def _alerted(run: Run, request: Request, given_up: GivenUp) -> Request:
    """The request with the result of its alert; the alert is sent again at each look until it is delivered."""
    if given_up.alerted:
        return request
    schedule = run.config.schedule
    text = f"{describe(request)}; see `recycle-and-train refreshes {run.config.storage}`"
    message = {
        "text": text,
        "name": run.config.name,
        "storage": run.config.storage,
        "refresh": request.key,
        "attempts": given_up.attempts,
        "reason": given_up.reason,
        "files": [name for name, _ in request.files],
    }
    errors = send_alert(message, schedule.alert_url_env, schedule.alert_command)
    now = run.requests.get(request.key)
    if now != request:  # a person retried it, or made it, while the alert was sent
        return now or request.model_copy(update={"given_up": None})
    update = {"alerted": not errors, "alert_errors": tuple(errors)}
    if update == given_up.model_dump(include=set(update)):
        return request
    return run.requests.put(request.model_copy(update={"given_up": given_up.model_copy(update=update)}))
