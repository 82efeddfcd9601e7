"""The Triton kernels compiled for GPUs that are not here: no spills, no atomics, little shared memory, tensor cores."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPORT = Path(__file__).resolve().parents[4] / "benchmarks" / "aot_report.py"
KERNELS = ("forward", "query_gradient", "key_gradient")
PARTS = {"paper": ("local", "level"), "causal_local": ("local", "lookback")}
# Modes, and chosen segments. Fewer on the last two, to save minutes; docs/aot.md has them all. The longest first.
CASES = {
    "sm_90": (("paper", "causal_local"), 16),
    "sm_80": (("paper", "causal_local"), 8),
    "sm_100": (("causal_local",), 16),
    "gfx942": (("causal_local",), 8),
}


@pytest.fixture(scope="module")
def reports():
    """What the report's program did for each target; one for each core at a time."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}

    def report(target):
        modes, chosen = CASES[target]
        command = [sys.executable, str(REPORT), "--json", "--targets", target, "--sizes", "64", "--chosen", str(chosen)]
        return subprocess.run(
            [*command, "--modes", *modes], env=environment, capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(os.cpu_count()) as cores:
        return dict(zip(CASES, cores.map(report, CASES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_committed_tiles_compile_to_what_they_should(target, reports):
    (modes, _), done = CASES[target], reports[target]
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    launches = {(mode, f"{kernel}, {part}") for mode in modes for kernel in KERNELS for part in PARTS[mode]}
    assert launches <= {(row["mode"], row["kernel"]) for row in rows}
    assert {"delta", "pool", "key_gradient, compact"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert (row["spills"], row["atomics"]) == (0, 0), row
        # LLVM may reserve a stack on gfx942 for scalar registers that end up in lanes of vector registers.
        assert row["stack"] == 0 or target == "gfx942", row
        assert row["shared_kb"] <= row["limit_kb"], row
        if row["kernel"] not in ("delta", "pool"):
            assert row["tensor_cores"] > 0, row
            assert row["copies"] > 0 or target == "gfx942", row
