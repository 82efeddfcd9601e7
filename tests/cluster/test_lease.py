"""Two runs never write to one storage; a killed run leaves it free."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.lease import StorageBusyError, lease

HOLD = """
import sys
from cluster.lease import lease

with lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageBusyError, match=f"another run is writing to {tmp_path}"), lease(str(tmp_path)):
        pass
    holder.kill()
    holder.wait()
    with lease(str(tmp_path)):
        pass
