"""The installed command on configs/smoke.yaml, as a new user runs it; test_ray_job.py runs a flow a second time."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cluster.sockets import is_loopback

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOOK_S = 2.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of an environment with the project's wheel and the packages of the test environment."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy)
    wheels, home = folder / "wheels", folder / "home"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True, capture_output=True)
    [wheel] = wheels.iterdir()
    venv.create(home, with_pip=False)
    here = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    others = sysconfig.get_path("purelib")  # .pth files in it, such as that of the editable install, are not read
    (here / "others.pth").write_text(f"{others}\n")
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", *install], check=True, capture_output=True, env=without_our_path())
    return home / "bin"


def without_our_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@dataclass
class Listening:
    """Sockets on which a run's processes listened: (address, program) of each that was seen at one of many looks."""

    seen: set[tuple[str, str]] = field(default_factory=set)

    def look(self, leader: psutil.Process) -> None:
        family = {process.pid: process for process in (leader, *leader.children(recursive=True))}
        for one in psutil.net_connections("inet"):  # of all processes at once: each look reads a long table
            if one.status == psutil.CONN_LISTEN and one.pid in family:
                with suppress(psutil.Error, IndexError):
                    self.seen.add((one.laddr.ip, family[one.pid].cmdline()[0]))


def run_flow(
    command: Sequence[str | Path], cwd: Path, *arguments: str, listening: Listening | None = None
) -> subprocess.CompletedProcess[str]:
    words = [*map(str, command), "--config", "configs/smoke.yaml", *arguments]
    environment = {**without_our_path(), "RAY_ADDRESS": "local"}
    with (cwd / "out").open("w+") as out, (cwd / "err").open("w+") as err:
        running = subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=err)
        try:
            while running.poll() is None:
                if listening is not None:
                    listening.look(psutil.Process(running.pid))
                with suppress(subprocess.TimeoutExpired):
                    running.wait(LOOK_S)
        finally:
            running.kill()
        texts = [Path(file.name).read_text() for file in (out, err)]
    return subprocess.CompletedProcess(words, running.returncode, *texts)


@pytest.mark.slow
def test_all_code_and_data_of_the_project_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = """
from importlib.metadata import files
from pathlib import Path
import cluster, flows, kernels, operators
import kernels.hyper_attention.gpu.local.forward, operators.report.report
print(*(Path(package.__file__).parent.parent for package in (cluster, flows, kernels, operators)))
print(*sorted(str(file) for file in files("recycle-and-train")))
"""
    python = installed / "python"
    ran = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=without_our_path(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    folders, files = (line.split() for line in ran.stdout.splitlines())
    [folder] = set(folders)
    assert Path(folder).is_relative_to(installed.parent)
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    packaged = ("flows/", "operators/", "kernels/", "cluster/", "configs/")
    missing = {name for name in tracked.stdout.splitlines() if name.startswith(packaged)} - set(files)
    assert {name for name in missing if not name.endswith("README.md")} == set()


@pytest.mark.slow
def test_the_installed_command_gives_a_student_and_a_report(installed: Path, tmp_path: Path, tiny_model: str) -> None:
    settings = [f"storage={tmp_path}", f"student.model={tiny_model}"]
    empty = tmp_path / "empty"
    empty.mkdir()
    listening = Listening()
    first = run_flow([installed / "recycle-and-train"], empty, *settings, listening=listening)
    assert first.returncode == 0, first.stderr + (log_of(tmp_path))
    assert any("RayTrainWorker" in name for _, name in listening.seen), "torch's store and gloo were seen"
    assert {place for place in listening.seen if not is_loopback(place[0])} == set()
    figures = json.loads((tmp_path / "reports" / "smoke.json").read_text())
    assert figures["rows"]["source"] == 48
    assert figures["conservation"]["holds"]
    assert {"calls", "cached_calls", "prompt_tokens", "generated_tokens", "seconds"} <= set(figures["teacher"])
    asked = [stage["teacher"] for stage in figures["stages"] if stage["asset"].endswith("_reflections")]
    used = sum(stage["prompt_tokens"] + stage["generated_tokens"] for stage in asked)
    assert figures["teacher"]["paid_tokens"] == used > 0
    assert figures["train"]["last_loss"] > 0
    assert figures["evaluation"]["held_out_loss"]["student"] > 0
    assert (tmp_path / "reports" / "smoke.html").stat().st_size > 10_000
    assert "Traceback" not in first.stdout + first.stderr

    [student] = (tmp_path / "students").iterdir()
    AutoTokenizer.from_pretrained(student)
    AutoModelForCausalLM.from_pretrained(student, use_safetensors=True)

    step = run_flow([installed / "recycle-and-train"], empty, *settings, "--step", "0")
    assert step.returncode == 0, step.stderr
    lines = step.stdout.splitlines()
    counted, *rows = lines[lines.index(f"student {student.name}") + 1 :]
    assert counted.startswith(f"step 0, epoch 0: {len(rows)} rows; each of the ")
    assert all(re.fullmatch(r"[0-9a-f]{32}", row_id) for row_id in rows)


def log_of(storage: Path) -> str:
    return "".join(file.read_text()[-3000:] for file in storage.glob("logs/*.log"))
