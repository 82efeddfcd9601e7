"""The reason why a run failed, in one line: from Dagster's nested errors, and from a run that has ended."""

from dataclasses import dataclass

import dagster as dg
import pytest

from flows.failures import INTERRUPTED, SHOWN_CHARS, failure_of, root_cause


@dataclass
class Error:
    """An error as Dagster reports it."""

    cls_name: str
    message: str
    cause: "Error | None" = None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Error("OSError", "OSError: disk\n"), "OSError: disk"),
        (Error("DagsterExecutionStepExecutionError", "x", Error("ValueError", "ValueError: y")), "ValueError: y"),
        (Error("TeacherStoppedError", "operators.TeacherStoppedError: reflect: 3 of 3 calls failed"), None),
        (Error("StorageError", "StorageError: a: b is damaged"), "a: b is damaged"),
        (Error("RayTaskError", "ray::f()\n  File 'a.py'\nValueError: the cause\n\n"), "ValueError: the cause"),
        (Error("D", "dagster._core.errors.DagsterExecutionInterruptedError\n"), INTERRUPTED),
        (Error("E", ""), "failed without words"),
        (None, "failed without an error"),
    ],
)
def test_the_innermost_error_is_shown_in_one_line(error: Error | None, line: str | None) -> None:
    shown = root_cause(error)
    assert shown == (line or "reflect: 3 of 3 calls failed")
    assert "\n" not in shown


def test_a_long_error_is_cut_and_says_where_the_rest_is() -> None:
    shown = root_cause(Error("E", "x" * 9999))
    assert len(shown) < SHOWN_CHARS + 50
    assert shown.endswith("... (the log has all of it)")


@dg.op
def fill_the_disk() -> None:
    raise OSError("the disk is full")


@dg.job
def full() -> None:
    fill_the_disk()


def test_a_run_that_ended_says_which_step_failed_and_why() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        failed = full.execute_in_process(instance=instance, raise_on_error=False)
        assert failure_of(instance, failed.dagster_run) == "fill_the_disk: OSError: the disk is full"


def test_a_run_whose_driver_was_killed_says_so() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.DagsterRun(job_name="job", status=dg.DagsterRunStatus.STARTED)
        instance.add_run(run)
        instance.report_run_failed(run, message="its driver was killed: https://me:word@host")
        assert failure_of(instance, run) == "its driver was killed: https://…@host"
