"""`--step N` on a storage without packs."""

import io
from pathlib import Path

import pytest

from cluster.runtime import REPOSITORY
from flows.config import ConfigError, load_config
from flows.recycle_and_train import GRAPH
from flows.run import open_run
from flows.steps import print_step


def test_a_step_of_a_storage_without_packs_is_refused(tmp_path: Path, tiny_model: str) -> None:
    settings = [f"storage={tmp_path}", f"student.model={tiny_model}"]
    run = open_run(load_config(REPOSITORY / "configs" / "smoke.yaml", settings), GRAPH.specs)
    out = io.StringIO()
    with pytest.raises(ConfigError, match="--step"):
        print_step(run, 0, out)
    assert out.getvalue() == ""
