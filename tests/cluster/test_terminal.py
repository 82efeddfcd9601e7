"""The terminal is for people; the output of libraries and child processes goes to the log."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from cluster.terminal import quiet_terminal, tell
with quiet_terminal(Path(sys.argv[1])) as (out, err):
    print("noise of Python")
    os.write(2, b"noise of C\\n")
    subprocess.run(["echo", "noise of a child"])
    out.write("for people\\n")
    err.write("an error\\n")
print("afterwards", flush=True)
tell("without a log")
with quiet_terminal(Path(sys.argv[1])):
    tell("the last words of a run that ends at once")
    os._exit(1)
"""


def test_noise_goes_to_the_log_and_comes_back_afterwards(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    repository = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(log)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == ["for people", "afterwards"]
    assert ran.stderr.splitlines() == ["an error", "without a log", "the last words of a run that ends at once"]
    assert sorted(log.read_text().splitlines()) == ["noise of C", "noise of Python", "noise of a child"]
