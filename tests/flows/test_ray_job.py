"""`ray job submit` as the README says, on a cluster that was started as it says: the job ends as the flow does."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.local import PATIENCE, child
from flows.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = "configs/demo.yaml"
AGENT = "52365"  # the port of the job agent, which Ray fixes
HOST = "192.0.2.7"  # an address of the machine other than loopback, in a network of its own
# The README's `ray start` takes fixed ports, so it gets a network without other clusters.
NETWORK = f"""
ip link set lo up
ip address add {HOST}/24 dev lo
ip route add default dev lo
"""
# Orders a command on every port of the host where somebody listens, with a token (the first argument) or without.
ORDER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
import psutil

host, token, entrypoint = sys.argv[1:]
ports = {one.laddr.port for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

def order(port, path):
    try:
        connection = HTTPConnection(host, port, timeout=8)
        connection.request("POST", path, json.dumps({"entrypoint": entrypoint}), headers)
        print("ordered", port, path, connection.getresponse().status, flush=True)
    except (OSError, HTTPException):
        pass

with ThreadPoolExecutor(64) as pool:
    for port in ports:
        for path in ("/api/job_agent/jobs/", "/api/jobs/"):
            pool.submit(order, port, path)
"""
ENDED = """
import sys
from ray.job_submission import JobSubmissionClient

for job in JobSubmissionClient(sys.argv[1]).list_jobs():
    print("job", job.entrypoint, job.status.value, job.driver_exit_code, flush=True)
"""

pytestmark = pytest.mark.timeout(1800)


def section_of_readme() -> str:
    return (REPOSITORY / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]


def commands_of_readme() -> list[str]:
    """The command lines of the README's section on clusters, as they stand."""
    return [line.removeprefix("$ ") for line in section_of_readme().splitlines() if line.startswith("$ ")]


def literal_of_readme() -> str:
    """The command that is enough if `ray start` ran in this folder."""
    [found] = re.findall(r"`(ray job submit [^`]+)` is enough", section_of_readme())
    return str(found)


@pytest.fixture
def project(tmp_path: Path, small_run: list[str]) -> Path:
    """A copy of this project whose `configs/demo.yaml` is a small run."""
    copy = tmp_path / "project"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    source = tmp_path / "source"
    source.mkdir()
    records = [{"instruction": f"Name {number} green things.", "input": "", "output": "Grass."} for number in range(8)]
    (source / "green.json").write_text(json.dumps(records))
    small = [*small_run[1:], "teacher.backend=scripted", "teacher.model=fluent"]
    config = load_config(REPOSITORY / DEMO, small).model_dump(mode="json")
    assert config["storage"] == "runs/demo"
    (copy / DEMO).write_text(yaml.safe_dump(config))
    return copy


def run_in_its_own_network(lines: list[str], project: Path, tmp_path: Path) -> str:
    """Run lines of a shell as a user of a new machine would; returns what they printed."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make a network namespace")
    home, ray_folder = tmp_path / "home", Path(f"/tmp/job-{os.getpid()}")  # it contains sockets: a short path
    home.mkdir()
    ray_folder.mkdir()
    cache = os.environ.get("RECYCLE_CACHE", str(Path.home() / ".cache" / "recycle-and-train"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RECYCLE_", "PYTHON"))}
    told = {"HOME": str(home), "RECYCLE_CACHE": cache, "RAY_TMPDIR": str(ray_folder), "RAY_USAGE_STATS_ENABLED": "0"}
    script, log = tmp_path / "script", tmp_path / "out"
    script.write_text("\n".join(["set -e", NETWORK, *lines, "echo the script ended"]))
    command = [*unshare, "bash", str(script)]
    try:
        with child(command, log, cwd=project, environment={**kept, **PATIENCE, **told}) as process:
            process.wait(1200)
            return log.read_text()
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.slow
def test_the_lines_of_the_readme_work_and_the_cluster_takes_no_job_without_its_token(
    project: Path, tmp_path: Path
) -> None:
    taken, refused = tmp_path / "taken", tmp_path / "refused"
    order = f"{shlex.quote(sys.executable)} -c {shlex.quote(ORDER)} {HOST}"
    printed = run_in_its_own_network(
        [
            *commands_of_readme(),
            "echo literal",
            literal_of_readme(),
            "echo unusable",
            f"{literal_of_readme()} train.zero_stage=4 || echo the client ended with $?",
            "echo no token",
            f'{order} "" "touch {refused}"',
            "echo with token",
            f'{order} "$(cat ~/.ray/auth_token)" "touch {taken}; true"',
            f"{shlex.quote(sys.executable)} -c {shlex.quote(ENDED)} $RAY_API_SERVER_ADDRESS",
            "stat -c 'mode %a' ~/.ray/auth_token",
        ],
        project,
        tmp_path,
    )
    assert "the script ended" in printed, printed
    first, literal, unusable, without, with_token = re.split(
        r"^(?:literal|unusable|no token|with token)$", printed, flags=re.MULTILINE
    )
    assert "made student" in first
    assert (project / "runs/demo/reports/demo.html").is_file()
    assert "everything was up to date: no teacher call, no training" in literal
    assert "train.zero_stage: 4 is not one of" in unusable
    assert "Traceback" not in unusable
    assert "the client ended with 1" in unusable
    assert re.search(r"zero_stage=4 FAILED 2$", with_token, re.MULTILINE), with_token
    answers = re.findall(r"^ordered (\d+) (\S+) (\d+)$", without, re.MULTILINE)
    assert (AGENT, "/api/job_agent/jobs/", "401") in answers, without
    assert {status for *_, status in answers} <= {"401", "405"}, without  # 405: metrics
    assert f"ordered {AGENT} /api/job_agent/jobs/ 200" in with_token, "only the token is missing"
    assert not refused.exists()
    token = (tmp_path / "home/.ray/auth_token").read_text().strip()
    assert token not in printed
    assert "mode 600" in with_token


def test_the_script_is_executable_where_git_checks_it_out() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "flows/recycle_and_train.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("100755"), listed.stdout
