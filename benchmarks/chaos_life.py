"""One life of a storage in chaos.py: runs of the flow as a user starts them, a fault, and the recovery."""

import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos_endpoint import Teacher
from benchmarks.chaos_ray import Driver, Forked, SharedRay, is_busy, name_of
from operators.files.copies import files_below

REPOSITORY = Path(__file__).resolve().parent.parent
LIMIT_S, LOOK_S, GONE_S = 900.0, 0.1, 30.0
BATCH, BATCHES = 4, 2
IN_FLIGHT = 3 * BATCH * BATCHES  # most calls in flight, as in operators/teacher/dispatch.py
MOST_RUNS = 6  # to recover
LIFE = "CHAOS_LIFE"  # environment variable that marks all processes of a life
ROWS = "raw_instructions,held_out,instruction_reflections,selected_instructions,response_reflections"
ROWS = f"{ROWS},recycled_instructions,published_dataset"
# What a run has just done when a fault strikes; "" is its start.
OF_ROWS = (
    "",
    "assets/raw_instructions/*_SUCCESS",
    "ledger/reflect_instructions/*.parquet",
    "assets/instruction_reflections/*_SUCCESS",
    "assets/selected_instructions/*_SUCCESS",
    "ledger/reflect_responses/*.parquet",
    "assets/recycled_instructions/*_SUCCESS",
)
OF_TRAINING = (
    "assets/packed_sequences/*",
    "students/*/metrics.jsonl",
    "assets/student/*_SUCCESS",
    "evaluations/*.parquet",
    "released.json",
)
CURE_DELETE = re.compile(r"delete (/\S+|[\w-]+/\S+?)(?:,| and run again)")
CURE_RENAME = re.compile(r"(\S+) is damaged .*; rename it to (\S+) and run again")


@dataclass
class Ended:
    """How a run ended: exit code (None if it had to be killed), and all that it printed."""

    code: int | None
    text: str


@dataclass
class Life:
    """A storage, its source and teacher, and what happened to it."""

    number: int
    random: random.Random
    folder: Path
    student: str
    teacher: Teacher
    trained: bool
    fault: str
    storage: str = ""
    settings: list[str] = field(default_factory=list)
    records: int = 0
    runs: int = 0
    struck: bool = False
    when: str = ""
    seconds_to_recover: float = 0.0
    seconds: float = 0.0  # of the whole life
    paid_again: int = 0  # calls that were made again although their answer was stored
    repeated: int = 0  # calls that were made again because they were in flight when the fault struck
    wrong: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    shared: SharedRay | None = None  # the cluster that its forked runs join; None if each starts its own
    nodes: Any = None  # a simulated cluster

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.storage = self.storage or str(self.folder / "storage")

    def drop(self, name: str, first: int, poison: bool = False) -> None:
        """Write a new source file of 30 records; some are bad or duplicate, or crash a mortal engine."""
        lines = [
            json.dumps({"instruction": f"Name river number {first + n} of the world.", "output": f"River {first + n}."})
            for n in range(26)
        ]
        lines += [lines[3], '{"instruction": ', json.dumps({"instruction": "", "output": "x"})]
        lines += [json.dumps({"instruction": f"{'POISON' if poison else 'Say'} {first}", "output": "Something."})]
        (self.folder / "source").mkdir(exist_ok=True)
        (self.folder / "source" / name).write_text("\n".join(lines) + "\n")
        self.records += len(lines)

    def overrides(self) -> list[str]:
        """The overrides of configs/smoke.yaml."""
        ours = {
            "storage": self.storage,
            "source.path": self.folder / "source",
            "student.model": self.student,
            "teacher.batch_rows": BATCH,
            "teacher.concurrent_batches": BATCHES,
            "teacher.concurrent_requests": 6,
            "teacher.commit_seconds": 0.3,
            "teacher.request_timeout_s": 3,
            "teacher.max_retries": 2,
            "evaluate.judge": "false",
            "evaluate.num_samples": 1,
            "evaluate.max_new_tokens": 4,
            "train.num_workers": 1,
            "train.zero_stage": 0,
            "train.checkpoint_every_steps": 1,
            "pack.max_tokens": 128,
            "storage_lost_after_seconds": 30,  # a run with little CPU time cannot renew a shorter lease in time
        }
        return [*(f"{key}={value}" for key, value in ours.items()), *self.settings]

    def command(self, refresh: str) -> list[str]:
        chosen = [] if self.trained else ["select.policy=none", "--select", ROWS]
        flow = [sys.executable, str(REPOSITORY / "flows/recycle_and_train.py"), "--config", "configs/smoke.yaml"]
        return [*flow, *self.overrides(), *chosen, "--refresh", refresh]

    def surroundings(self) -> dict[str, str]:
        """The environment of the processes that this life starts."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_ADDRESS": self.shared.ready().address if self.shared else "local",
            "RAY_TMPDIR": f"/tmp/c{os.getpid()}",  # noqa: S108 - it contains sockets, so the path must be short
            "XDG_STATE_HOME": str(self.folder / "state"),
            LIFE: f"{os.getpid()}-{self.number}",
            **self.environment,
        }
        Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
        return environment

    def start(self, refresh: str = "base") -> tuple[Driver, Path]:
        """Start a run; returns its process and the file with its output."""
        self.runs += 1
        out, environment = self.folder / f"run-{self.runs}.out", self.surroundings()
        if self.shared:
            return Forked(self.command(refresh), environment, out), out
        with out.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603 - our own command
                self.command(refresh), cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip
        return process, out

    def finish(self, process: Driver, out: Path) -> Ended:
        """Wait for the end of a run, and check that no process of it remains."""
        code: int | None = None
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"a run did not end within {LIMIT_S:g} s")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = out.read_text(errors="replace")
        if "Traceback (most recent call last)" in text:
            self.wrong.append(f"a traceback on the terminal, see {out}")
        self.require_gone()
        return Ended(code, text)

    def require_gone(self) -> None:
        """Wait until no process of this life runs any more; processes that remain are counted and killed."""
        deadline = time.monotonic() + GONE_S
        while (left := self._processes()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.5)
        if left:
            named = Counter(name_of(process) for process in left)
            self.wrong.append(f"processes left {GONE_S:g} s after the end: {dict(named)}")
            for process_left in left:
                with suppress(psutil.Error):
                    process_left.kill()

    def run(self, refresh: str = "base") -> Ended:
        """A run to its end."""
        return self.finish(*self.start(refresh))

    def _processes(self) -> list[psutil.Process]:
        found = self.shared.left() if self.shared else []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(LIFE) == f"{os.getpid()}-{self.number}":
                    found.append(process)
        return found

    def await_moment(self, process: Driver, when: str | None = None) -> bool:
        """Wait for a moment of the run, by default one that the seed determines; False if the run ended before."""
        self.when = self.random.choice([*OF_ROWS, *(OF_TRAINING if self.trained else ())]) if when is None else when
        wait = self.random.uniform(0.2, 3 if self.shared else 8) if not self.when else self.random.uniform(0, 1.5)
        while self.when and process.poll() is None:
            if any(fnmatch.fnmatch(name, self.when) for name in files_below(self.storage)):
                break
            time.sleep(LOOK_S)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        return process.poll() is None

    def recover(self, refresh: str, ended: Ended) -> None:
        """Run the same command, and follow its messages, until it ends with 0 and no call is left to be made again."""
        started, last = time.monotonic(), ""
        for _ in range(MOST_RUNS):
            if ended.code == 0 and "the next run makes" not in ended.text:
                self.seconds_to_recover += time.monotonic() - started
                return
            cured = self.cure(ended.text)
            message = ended.text.strip().splitlines()[-1] if ended.text.strip() else ""
            if message == last and ended.code in (1, 2, 3) and not cured:
                self.wrong.append(f"stuck: {message}")
                return
            last = message
            ended = self.run(refresh)
        self.wrong.append(f"not recovered after {MOST_RUNS} runs: {last}")

    def cure(self, text: str) -> bool:
        """Do what the messages of a run tell the user to do; returns whether there was anything to do."""
        done = False
        for path in map(Path, CURE_DELETE.findall(text)):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            done = True
        for path, name in CURE_RENAME.findall(text):
            if Path(path).is_file():
                Path(path).rename(Path(path).with_name(name))
                done = True
        return done


def victims(life: Life, process: Driver, wanted: Sequence[str]) -> list[psutil.Process]:
    """Processes of a life's run whose name or title begins with one of these words, without idle workers."""
    found = life.shared.workers() if life.shared else []
    with suppress(psutil.Error):
        found += psutil.Process(process.pid).children(recursive=True)
    named = [(name_of(one), one) for one in found]
    chosen = [(name, one) for name, one in named if name.startswith(tuple(wanted))]
    chosen = [(name, one) for name, one in chosen if is_busy(name) or not name.startswith("ray::")]
    return [one for name, one in sorted(chosen, key=lambda each: (each[0], each[1].pid))]
