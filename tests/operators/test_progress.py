"""One bar or line per stage, from reports of any process; without a board a report does nothing."""

import errno
import io
import os
import pty
import re
from types import SimpleNamespace

import pytest
import ray

from operators.progress import Bars, Lines, ProgressLines, StageProgress, board_name, format_stage, report_progress


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


def test_a_file_gets_a_line_only_when_something_has_changed() -> None:
    out = io.StringIO()
    lines = Lines(out)
    at_work = {"pack": StageProgress(rows=1, total=4, started=0.0, seen=2.0)}
    lines.show(at_work)
    lines.show(at_work)
    lines.show({"pack": StageProgress(rows=4, total=4, started=0.0, seen=3.0)})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/4", "4/4"]


def read_to_the_end(reader: int) -> str:
    """Everything that was sent to a closed terminal. One read only returns what the kernel has passed on so far."""
    parts = []
    with os.fdopen(reader, "rb", buffering=0) as stream:
        try:
            while part := stream.read(4096):
                parts.append(part)
        except OSError as error:
            if error.errno != errno.EIO:  # on Linux this marks the end of a pseudo-terminal
                raise
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar_with_rows_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        bars = Bars(terminal)
        bars.show({"train": StageProgress(rows=10, tokens=500, total=40, note="[loss] 2.0", started=0.0, seen=10.0)})
        bars.show({"pack": StageProgress(rows=3, started=0.0, seen=10.0)})
        bars.close()
    drawn = read_to_the_end(reader)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert re.search(r"train +[━╸╺]{20} 10/40 rows 50 tokens/s \S+ \[loss\] 2.0", plain)
    assert re.search(r"pack +━{20} 3/\? rows", plain.splitlines()[-1])
    assert drawn.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


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


def test_two_runs_on_one_cluster_have_separate_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for job in ("01000000", "02000000"):
        context = SimpleNamespace(get_job_id=lambda job=job: job)
        monkeypatch.setattr(ray, "get_runtime_context", lambda context=context: context)
        names.append(board_name())
    assert len(set(names)) == 2
