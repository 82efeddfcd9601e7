"""Forked drivers and a shared Ray cluster, with which chaos.py can run many lives per hour.

A run that is started from the command line takes 8 CPU seconds before its first row: five for Ray and three for
imports. A forked driver is a separate process that has the imports of its parent. The shared cluster is started by
`ray start`, as by the shipped unit, and continues after the drivers end.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from cluster.local import free_port, local_cluster

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONS = ("--num-cpus=2", "--object-store-memory=300000000")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["flows.recycle_and_train", "transformers.models.auto.tokenization_auto"])


AGENTS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # belong to the node, not to a run
# Ray Data starts these once per cluster; they continue after the run that started them.
DETACHED = ("ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::ActorLocationTracker")


class Driver(Protocol):
    """A process that runs the flow."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Forked:
    """A driver forked from a process that has imported the flow."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], out: Path) -> None:
        """Start the driver in a new session."""
        self._process = FORKS.Process(target=_drive, args=(list(command[1:]), dict(environment), str(out)))
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the driver ends; return its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("the flow", timeout or 0.0)
        return code


def _drive(argv: list[str], environment: dict[str, str], out: str) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    from flows.recycle_and_train import main

    sys.exit(main())


class SharedRay:
    """A Ray cluster on this machine, which is started again if a life has killed it."""

    def __init__(self, folder: Path) -> None:
        """Start nothing yet; the cluster's log will be in this folder."""
        self._folder, self._stack = folder, ExitStack()
        self.address, self.dashboard = "", ""
        self._raylet: psutil.Process | None = None

    def ready(self) -> "SharedRay":
        """Start the cluster unless it runs."""
        if self._raylet is None or not self._raylet.is_running():
            self.stop()
            port = free_port()
            log, options = self._folder / f"ray-{port}.log", [*OPTIONS, f"--port={port}"]
            started = local_cluster(free_port(), log, cwd=REPOSITORY, environment=_environment(), options=options)
            self.dashboard = self._stack.enter_context(started)
            self.address = f"127.0.0.1:{port}"
            self._raylet = _raylet_of(self.address)
        return self

    def stop(self) -> None:
        self._stack.close()
        self._raylet = None

    def workers(self) -> list[psutil.Process]:
        """The workers that it runs for connected drivers, without the idle ones that it keeps ready."""
        if self._raylet is None:
            return []
        with suppress(psutil.Error):
            return [child for child in self._raylet.children(recursive=True) if is_busy(name_of(child))]
        return []

    def left(self) -> list[psutil.Process]:
        """The workers that should have ended with the run."""
        return [worker for worker in self.workers() if not name_of(worker).startswith(DETACHED)]


def is_busy(title: str) -> bool:
    """Whether this is the title of a Ray worker that works for a run."""
    return title.startswith("ray::") and not title.startswith(AGENTS)


def name_of(process: psutil.Process) -> str:
    """The title of a Ray worker, or else the name of the program."""
    with suppress(psutil.Error):
        line = process.cmdline()
        return line[0] if line and line[0].startswith("ray::") else process.name()
    return "?"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}


def _raylet_of(address: str) -> Any:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and f"--gcs-address={address}" in " ".join(process.cmdline()):
                return process
    raise RuntimeError(f"no raylet of {address} runs")
