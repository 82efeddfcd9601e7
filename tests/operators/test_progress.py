"""One line a stage, from reports of any process; without a board a report does nothing."""

import io

import pytest
import ray

from operators.progress import ProgressLines, StageProgress, format_stage, report_progress


def test_a_line_has_rows_rate_and_time_left() -> None:
    progress = StageProgress(rows=10, tokens=500, total=40, note="loss 2.0", started=0.0, seen=10.0)
    line = format_stage("train", progress)
    assert line.split() == [
        "train",
        "10/40",
        "rows",
        "500",
        "tokens",
        "50",
        "tokens/s",
        "30",
        "s",
        "left",
        "loss",
        "2.0",
    ]


def test_a_finished_stage_has_no_time_left() -> None:
    assert "left" not in format_stage("pack", StageProgress(rows=4, total=4, started=0.0, seen=2.0))


def test_a_stage_that_waits_for_its_engine_says_so() -> None:
    waiting = StageProgress(rows=0, total=40, started=0.0, seen=2.0)
    assert "starting" in format_stage("reflect", waiting)
    assert "starting" not in format_stage("reflect", StageProgress(rows=1, total=40, started=0.0, seen=2.0))


@pytest.mark.usefixtures("local_ray")
def test_reports_of_workers_reach_the_terminal() -> None:
    report_progress("nobody listens", rows=1)

    @ray.remote(num_cpus=0)
    def work() -> None:
        report_progress("reflect", rows=3, tokens=30)

    out = io.StringIO()
    with ProgressLines(out) as lines:
        report_progress("reflect", total=9)
        ray.get([work.remote() for _ in range(3)])
        lines.wait_for("reflect", rows=9)
    assert "9/9 rows" in out.getvalue()
    assert "90 tokens" in out.getvalue()
    assert "nobody" not in out.getvalue()
