"""What a worker runs. That it trains is shown in test_train.py and test_bucket.py."""

import subprocess
import sys

import pytest

from operators.train.config import TrainConfig
from operators.train.job import TrainJob, run_worker


@pytest.mark.parametrize(
    ("folder", "body"), [("/students/a", "loop.train_worker"), ("s3://bucket/students/a", "bucket.train_from_bucket")]
)
def test_a_worker_of_a_student_in_a_bucket_runs_the_body_for_buckets(folder, body, monkeypatch):
    ran = []
    monkeypatch.setattr(f"operators.train.{body}", ran.append)
    settings = {"job": TrainJob(TrainConfig(), "student", folder, [], "digest", "identity")}
    run_worker(settings)
    assert ran == [settings]


def test_a_driver_imports_no_transformers():
    code = "import sys, operators.train.train; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
