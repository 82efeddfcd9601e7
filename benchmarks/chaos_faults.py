"""The faults of chaos.py: each starts a run of a life, strikes at a moment that the seed determines, and waits.

A run that a fault ends may have the exit codes that the fault names; any other code counts as a broken promise.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import psutil

from benchmarks.chaos_daemon import kill_daemon, set_clock
from benchmarks.chaos_endpoint import MODES, Store, failing
from benchmarks.chaos_life import LOOK_S, Ended, Life, victims
from benchmarks.chaos_nodes import MOMENTS, give_nodes_back, kill_node
from benchmarks.chaos_ray import Driver

DISK_BYTES = 256 << 20
KILLED, STOPPED, ENDED, WENT_ON = -signal.SIGKILL, -signal.SIGTERM, 1, 0
WORKERS = ("ray::MapWorker", "ray::Caller", "ray::RayTrainWorker", "ray::TrainController", "ray::MapBatches")
TRAINERS, PACKED = ("ray::RayTrainWorker", "ray::TrainController"), "assets/packed_sequences/*"
# Files that a second refresh reads again; damage in other files shows only when somebody reads them.
DAMAGED = (
    *(f"assets/{name}/refresh=base/" for name in ("raw_instructions", "held_out", "recycled_instructions")),
    *("assets/instruction_reflections/refresh=base/manifest.json", "assets/published_dataset/manifest.json"),
    *("ledger/", "scores/", "prompts/", "assets/packed_sequences/", "evaluations/", "releases/", "released.json"),
    *("assets/evaluation/", "assets/student/", "assets/release/", "dagster/"),
)


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: of the fault.
        strike: runs a life with the fault; returns the refresh that has to recover, and how its run ended.
        end: releases what the fault needed (disks, servers).
        mortal: the teacher is an engine that one record crashes; else an endpoint.
        refreshes: number of refreshes of the life.
        trained: whether its runs train; None lets the seed choose.
        damages: files are lost, so their calls are made again.
        own_ray: every run starts a Ray of its own, as one typed command does.
        shared_ray: it joins the cluster that lives share; without both the seed chooses.
    """

    name: str
    strike: Callable[[Life], tuple[str, Ended]]
    end: Callable[[Life], None] = lambda _: None
    mortal: bool = False
    refreshes: int = 1
    trained: bool | None = None
    damages: bool = False
    own_ray: bool = False
    shared_ray: bool = False


def during(
    life: Life, act: Callable[[Driver], bool], allowed: Collection[int], when: str | None = None
) -> tuple[str, Ended]:
    """Act in the middle of a run, at a moment that the seed determines or from a given one."""
    process, out = life.start()
    if life.await_moment(process, when):
        life.struck = act(process)
    ended = life.finish(process, out)
    if ended.code not in {*allowed, WENT_ON}:
        said = ended.text.strip().splitlines()
        life.wrong.append(f"the run ended with {ended.code}, not {sorted(allowed)}: {said[-1] if said else ''}")
    return "base", ended


def kill_driver(life: Life) -> tuple[str, Ended]:
    return during(life, lambda process: _signal(process.pid, signal.SIGKILL), [KILLED])


def kill_job(life: Life) -> tuple[str, Ended]:
    def act(process: Driver) -> bool:
        os.killpg(process.pid, signal.SIGKILL)
        return True

    return during(life, act, [KILLED])


def terminate(life: Life) -> tuple[str, Ended]:
    return during(life, lambda process: _signal(process.pid, signal.SIGTERM), [STOPPED, 128 + signal.SIGTERM, ENDED])


def interrupt(life: Life) -> tuple[str, Ended]:
    allowed = [-signal.SIGINT, 128 + signal.SIGINT, ENDED]
    return during(life, lambda process: _signal(process.pid, signal.SIGINT), allowed)


def _victim(*names: str, when: str | None = None) -> Callable[[Life], tuple[str, Ended]]:
    """Kill one of the processes of these names, as soon as there is one after that moment."""

    def strike(life: Life) -> tuple[str, Ended]:
        def act(process: Driver) -> bool:
            while not (found := victims(life, process, names)):
                if process.poll() is not None:
                    return False
                time.sleep(LOOK_S)
            return _signal(life.random.choice(found).pid, signal.SIGKILL)

        return during(life, act, [ENDED], when)

    return strike


def endpoint(mode: str) -> Callable[[Life], tuple[str, Ended]]:
    """The endpoint misbehaves for some seconds."""

    def strike(life: Life) -> tuple[str, Ended]:
        process, out = life.start()
        life.struck = life.await_moment(process)
        seconds = life.random.uniform(1, 10)
        with failing(life.teacher, "mode", mode, seconds):
            ended = life.finish(process, out)
        if ended.code not in (WENT_ON, ENDED):
            life.wrong.append(f"the run ended with {ended.code}: {ended.text[-200:]}")
        return "base", ended

    return strike


def second_run(life: Life) -> tuple[str, Ended]:
    """Two runs at once: the second must be refused with one line, and the first must continue."""

    def act(_: Driver) -> bool:
        second, out = life.start()
        code = second.wait(300)
        text = out.read_text()
        if code == WENT_ON and "everything was up to date" in text:
            return False  # the first had ended before the second looked
        if code != ENDED or "another run is writing" not in text or "Traceback" in text:
            life.wrong.append(f"the second run ended with {code}: {text[-200:]}")
        return True

    refresh, ended = during(life, act, [])
    return refresh, ended


def damage(kind: str) -> Callable[[Life], tuple[str, Ended]]:
    """Damage a file of a finished storage, then let new data come."""

    def strike(life: Life) -> tuple[str, Ended]:
        first = life.run()
        if first.code != 0:
            life.wrong.append(f"the first run ended with {first.code}: {first.text[-200:]}")
        there = [path for path in sorted(Path(life.storage).rglob("*")) if path.is_file() and path.stat().st_size]
        places = [path for path in there if str(path.relative_to(life.storage)).startswith(DAMAGED)]
        tops = sorted(
            {str(path.relative_to(life.storage)).split("/refresh=")[0].split("/")[0:2][-1] for path in places}
        )
        top = life.random.choice(tops)
        path = life.random.choice([path for path in places if f"/{top}" in str(path)])
        life.when = str(path.relative_to(life.storage))
        content = bytearray(path.read_bytes())
        if kind == "truncate":
            content = content[: life.random.randrange(len(content))]
        else:
            for _ in range(life.random.randint(1, 3)):
                content[life.random.randrange(len(content))] ^= 1 << life.random.randrange(8)
        path.write_bytes(content)
        life.struck = True
        life.drop("b.jsonl", 1000)
        ended = life.run("second")
        if ended.code not in (WENT_ON, ENDED):
            life.wrong.append(f"the run after the damage ended with {ended.code}: {ended.text[-300:]}")
        return "second", ended

    return strike


def full_disk(life: Life) -> tuple[str, Ended]:
    """A small disk that is filled almost completely at once; space is freed before the next run."""
    storage = Path(life.storage)
    storage.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", life.storage], check=True)  # noqa: S603, S607
    filler = storage / "filler"

    def act(_: Driver) -> bool:
        left = life.random.choice([0, 4096, life.random.randrange(300_000)])
        with filler.open("wb") as file, suppress(OSError):
            file.truncate(0)
            free = os.statvfs(storage).f_bavail * os.statvfs(storage).f_frsize
            os.posix_fallocate(file.fileno(), 0, max(1, free - left))
        return True

    refresh, ended = during(life, act, [ENDED, 2])
    filler.unlink(missing_ok=True)
    if ended.code == ENDED and "disk" not in ended.text:
        life.wrong.append(f"the full disk is not named: {ended.text.strip().splitlines()[-1:]}")
    return refresh, ended


def give_disk_back(life: Life) -> None:
    subprocess.run(["umount", "-l", life.storage], check=False)  # noqa: S603, S607


def bucket(strike_of: Callable[[Life], tuple[str, Ended]] | None) -> Callable[[Life], tuple[str, Ended]]:
    """The storage is a bucket of an S3 server; without another fault, the server refuses requests for some seconds."""

    def strike(life: Life) -> tuple[str, Ended]:
        store = Store()
        os.environ["AWS_ENDPOINT_URL_S3"] = store.address
        life.environment = {"AWS_DEFAULT_REGION": "us-east-1", "RECYCLE_CACHE": str(life.folder / "cache")}
        name = f"chaos-{life.number}-{int(time.time())}"
        boto3.client("s3", endpoint_url=store.address, region_name="us-east-1").create_bucket(Bucket=name)
        life.storage = f"s3://{name}/runs"
        if strike_of is not None:
            return strike_of(life)
        process, out = life.start()
        life.struck = life.await_moment(process)
        with failing(store, "share", life.random.choice([0.1, 0.5, 1.0]), life.random.uniform(1, 15)):
            ended = life.finish(process, out)
        if ended.code not in (WENT_ON, ENDED):
            life.wrong.append(f"the run ended with {ended.code}: {ended.text[-200:]}")
        return "base", ended

    return strike


def forget_store(_: Life) -> None:
    os.environ.pop("AWS_ENDPOINT_URL_S3", None)


def poison(life: Life) -> tuple[str, Ended]:
    """One record crashes every engine that reads it; there is no other fault."""
    life.struck = True
    return "base", life.run()


def _signal(pid: int, number: signal.Signals) -> bool:
    with suppress(psutil.Error, ProcessLookupError):
        psutil.Process(pid).send_signal(number)
        return True
    return False


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill driver", kill_driver),
        Fault("kill driver and all its processes", kill_job, own_ray=True),
        Fault("SIGTERM", terminate),
        Fault("Ctrl-C", interrupt),
        Fault("kill worker", _victim(*WORKERS)),
        Fault("kill train worker", _victim(*TRAINERS, when=PACKED), trained=True),
        Fault("kill any actor", _victim("ray::")),
        Fault("kill raylet", _victim("raylet"), own_ray=True),
        Fault("kill GCS", _victim("gcs_server"), own_ray=True),
        Fault("kill engine", _victim("ray::MortalEngine", "ray::EnginePool"), mortal=True, trained=False),
        Fault("poison record", poison, mortal=True, trained=False),
        *(Fault(f"endpoint {mode}", endpoint(mode), trained=False) for mode in MODES),
        Fault("two runs at once", second_run, trained=False),
        Fault("truncated file", damage("truncate"), refreshes=2, damages=True),
        Fault("flipped bits", damage("flip"), refreshes=2, damages=True),
        Fault("full disk", full_disk, give_disk_back),
        Fault("S3 errors", bucket(None), forget_store, trained=False),
        *(
            Fault(f"kill node in {stage}", kill_node(stage), give_nodes_back, trained=stage != "reflection")
            for stage in MOMENTS
        ),
        Fault("kill driver on S3", bucket(kill_driver), forget_store, trained=False),
        Fault("kill daemon", kill_daemon, trained=True, shared_ray=True),
        Fault("clock set", set_clock(during), own_ray=True),
    )
}
