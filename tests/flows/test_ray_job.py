"""`ray job submit`, in its literal form and as in the README, on a real cluster; the job ends as the flow does."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from flows.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE, DEMO = "configs/smoke.yaml", "configs/demo.yaml"
SUBMISSION = re.compile(r"Job '(raysubmit_\w+)' submitted")

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Ended:
    """The output of the client, and what the jobs API reports for the job."""

    client_code: int
    driver_code: int | None
    status: str
    text: str


def submit(address: str, *arguments: str) -> Ended:
    """Run `ray job submit` in the repository root, as a person would."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["ray", "job", "submit", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "RAY_API_SERVER_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    text = done.stdout + done.stderr
    submitted = SUBMISSION.search(text)
    assert submitted is not None, text
    job = JobSubmissionClient(address).get_job_info(submitted[1])
    return Ended(done.returncode, job.driver_exit_code, str(job.status), text)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    records = [{"instruction": f"Name {number} green things.", "input": "", "output": "Grass."} for number in range(8)]
    (source / "green.json").write_text(json.dumps(records))
    return tmp_path / "storage"


def commands_of_readme() -> list[list[str]]:
    """The commands of the README's section on clusters, each as a shell splits it."""
    section = (REPOSITORY / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]
    return [shlex.split(line[2:], comments=True) for line in section.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_the_literal_command_and_the_one_in_the_readme_do_the_same_work(
    ray_cluster: str, default_of_jobs: Path, small_run: list[str], storage: Path
) -> None:
    small_run = [*small_run, "teacher.backend=scripted", "teacher.model=fluent"]
    config = load_config(REPOSITORY / DEMO, small_run)
    default_of_jobs.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    literal = submit(ray_cluster, "flows/recycle_and_train.py")
    assert (literal.client_code, literal.driver_code, literal.status) == (0, 0, "SUCCEEDED"), literal.text
    assert (storage / "reports/demo.html").is_file()
    assert "made student" in literal.text

    [readme] = [words for words in commands_of_readme() if words[:3] == ["ray", "job", "submit"]]
    assert readme[-1] == DEMO
    relative = f"storage={os.path.relpath(storage, REPOSITORY)}"  # relative to the folder where the cluster was started
    other = submit(ray_cluster, *readme[3:], *small_run[1:], relative, "report.num_pairs=2")
    assert (other.client_code, other.driver_code) == (0, 0), other.text
    assert re.findall(r"^made (\w+)", other.text, re.MULTILINE) == ["report"], other.text


@pytest.mark.slow
def test_the_job_ends_with_the_exit_code_of_the_flow(ray_cluster: str, small_run: list[str]) -> None:
    ended = submit(ray_cluster, "--", "flows/recycle_and_train.py", "--config", SMOKE, *small_run, "train.zero_stage=4")
    assert (ended.client_code, ended.driver_code, ended.status) == (1, 2, "FAILED"), ended.text
    assert "train.zero_stage: 4 is not one of" in ended.text
    assert "Traceback" not in ended.text


def test_the_script_is_executable_where_git_checks_it_out() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "flows/recycle_and_train.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("100755"), listed.stdout
