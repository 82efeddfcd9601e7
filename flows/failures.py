"""Says in one line why a run of Dagster failed."""

import dagster as dg

from cluster.files import StorageError
from operators.files.damage import DamagedFileError
from operators.redact import without_credentials
from operators.teacher.dispatch import TeacherStoppedError

SHOWN_CHARS = 500  # of an error on the terminal; the log has all of it
OURS = ("flows.", "operators.", "cluster.", "kernels.")  # errors that this project raises
# The same where Ray leaves the module out.
SENTENCES = (TeacherStoppedError.__name__, StorageError.__name__, DamagedFileError.__name__)
INTERRUPTED = "interrupted by Ctrl-C or SIGTERM; run the same command to continue"
LAST_EVENTS = 200  # of a run, which are searched for the failure


def root_cause(error: object) -> str:
    """The innermost error of a chain of Dagster's errors, in one line.

    Errors of Ray's workers contain their whole traceback; its last line says what went wrong.
    """
    while getattr(error, "cause", None) is not None:
        error = error.cause  # type: ignore[attr-defined]
    if error is None:
        return "failed without an error"
    return words_of(error.message)  # type: ignore[attr-defined]


def words_of(error: object) -> str:
    """The last line of an error, without the name of the class if the message is ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last: str = without_credentials(lines[-1]) if lines else "failed without words"
    if last.partition(":")[0].endswith(dg.DagsterExecutionInterruptedError.__name__):
        return INTERRUPTED
    # Our own messages are understandable without the name of the class, so it is left out.
    head, _, words = last.partition(": ")
    shown = words if head.startswith(OURS) or head in SENTENCES else last
    return shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}... (the log has all of it)"


def failure_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """Why an ended run failed: its failed step or check, else Dagster's own message about the run."""
    failed = (dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED)
    records = instance.get_records_for_run(run.run_id, of_type=set(failed), limit=LAST_EVENTS).records
    events = [entry for record in records if (entry := record.event_log_entry.dagster_event) is not None]
    for event in events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            return f"{event.step_key}: {root_cause(event.step_failure_data.error)}"
    for event in events:
        error = getattr(event.event_specific_data, "error", None)
        if error is not None:
            return root_cause(error)
    words = [line for event in events for line in (event.message or "").splitlines() if line.strip()]
    return (
        str(without_credentials(words[0]))[:SHOWN_CHARS]
        if words
        else f"run {run.run_id[:8]} ended as {run.status.value}"
    )
