"""The faults of chaos.py that affect the daemon or the machine's clock.

The daemon is that of `make ui`, on the shared cluster. This file takes the part of its supervisor and starts it again.
The clock is set by a library that driver and Ray preload (chaos_clock.c, built by gcc). As on a real machine, monotonic
clocks are not affected. Debian's libfaketime 0.9.10 cannot be used: if monotonic clocks are unchanged, it makes
Python's `time.sleep` fail.
"""

import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.chaos_life import LIMIT_S, LOOK_S, REPOSITORY, Ended, Life
from benchmarks.chaos_ray import Driver
from cluster.local import free_port
from operators.files.copies import files_below

CLOCK = Path(__file__).with_name("chaos_clock.c")
STEPS_S = (-86_400, -3_600, -90, 90, 3_600, 86_400, 40 * 86_400)
PARTS = ("dagster._daemon", "dagster api grpc", "dagster dev", "flows.ui", "")  # "" kills all of them at once
REFRESH = re.compile(r"assets/raw_instructions/refresh=([^/]+)/_SUCCESS")


class Daemon:
    """`python -m flows.ui` of a life."""

    def __init__(self, life: Life) -> None:
        """Start the daemon."""
        self._life, self.starts = life, 0
        self._port = free_port()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        life = self._life
        self.starts += 1
        overrides = [
            *life.overrides(),
            "schedule.active=true",
            "schedule.sensor_seconds=2",
            "schedule.settle_seconds=0",
        ]
        overrides += ["schedule.retry_seconds=5"]
        environment = life.surroundings()
        environment["RAY_API_SERVER_ADDRESS"] = life.shared.dashboard if life.shared else ""
        del environment["RAY_ADDRESS"]  # Ray sets it for the jobs
        command = [sys.executable, "-m", "flows.ui", "--config", "configs/smoke.yaml", "--port", str(self._port)]
        with (life.folder / f"daemon-{self.starts}.out").open("wb") as out:
            return subprocess.Popen(  # noqa: S603 - our own command
                [*command, *overrides], cwd=REPOSITORY, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        return []

    def kill(self, part: str) -> bool:
        """Kill its processes whose command line contains `part`; "" means all. Returns whether there was any."""
        killed = False
        for process in self.family():
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    process.kill()
                    killed = True
        return killed

    def keep(self) -> None:
        """Start it again if it has ended, as a supervisor does."""
        if self.process.poll() is not None:
            for process in self._life._processes():
                with suppress(psutil.Error):  # systemd ends the remaining processes of the unit
                    if " ".join(process.cmdline()).count("dagster"):
                        process.kill()
            self.process = self._start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self._life.wrong.append("the daemon did not end 60 s after SIGINT")
            self.kill("")
            code = self.process.wait()
        if code:
            self._life.wrong.append(f"the daemon ended with {code} after SIGINT")


def kill_daemon(life: Life) -> tuple[str, Ended]:
    """The daemon must process a new file on its own, while some of its processes are killed during the refresh."""
    daemon = Daemon(life)
    try:
        life.runs += 1
        life.struck = life.await_moment(daemon.process) and daemon.kill(life.random.choice(PARTS))
        struck = time.monotonic()
        deadline = struck + LIMIT_S
        while not _is_finished(life.storage):
            if time.monotonic() > deadline:
                life.wrong.append(f"not recovered: the refresh was not finished within {LIMIT_S:g} s")
                break
            daemon.keep()
            time.sleep(LOOK_S * 5)
        life.seconds_to_recover = time.monotonic() - struck
    finally:
        daemon.stop()
    life.require_gone()
    found = [match[1] for name in files_below(life.storage) if (match := REFRESH.fullmatch(name))]
    if len(found) != 1:
        life.wrong.append(f"one file became {len(found)} refreshes")
    return (found[0] if found else "base"), Ended(0, "")


def _is_finished(storage: str) -> bool:
    names = set(files_below(storage))
    return "assets/report/_SUCCESS" in names and not any(name.startswith("refreshes/") for name in names)


def set_clock(
    during: Callable[[Life, Callable[[Driver], bool], list[int]], tuple[str, Ended]],
) -> Callable[[Life], tuple[str, Ended]]:
    """The machine's clock is set in the middle of a run, forwards or back by 90 seconds to 40 days, and stays so."""

    def strike(life: Life) -> tuple[str, Ended]:
        clock, library = life.folder / "clock", life.folder / "clock.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, CLOCK, "-ldl"], check=True)  # noqa: S603, S607
        clock.write_bytes(struct.pack("q", 0))
        life.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(clock)}

        def act(_: Driver) -> bool:
            step = life.random.choice(STEPS_S)
            life.when += f", {step:+d} s"
            with clock.open("r+b") as file:  # in place, because it is mapped into memory
                file.write(struct.pack("q", step))
            return True

        return during(life, act, [])

    return strike
