"""The Triton kernels compiled for GPUs that are not here: no spills, no atomics, little shared memory, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "aot_report.py"
LAUNCHES = {
    "forward, local",
    "forward, level",
    "forward, lookback",
    "delta",
    "query_gradient, local",
    "query_gradient, level",
    "query_gradient, lookback",
    "key_gradient, local",
    "key_gradient, level",
    "key_gradient, lookback",
    "key_gradient, compact",
    "pool",
}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "size"), [("sm_90", 64)])
def test_committed_tiles_compile_to_what_they_should(target, size):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPORT), "--json", "--targets", target, "--sizes", str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == LAUNCHES
    for row in rows:
        assert (row["stack"], row["spills"], row["atomics"]) == (0, 0, 0), row
        assert row["shared_kb"] <= row["limit_kb"], row
        assert row["tensor_cores"] > 0 or row["kernel"] in ("delta", "pool"), row
        if target != "gfx942" and row["kernel"] not in ("delta", "pool"):
            assert row["copies"] > 0, row
