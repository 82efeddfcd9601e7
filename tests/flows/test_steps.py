"""`--step N` names the rows of the student that was trained, or says that they are not known any more."""

import io
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from cluster.runtime import REPOSITORY
from cluster.storage import Recipe
from flows.config import ConfigError, load_config
from flows.graph import PACKED_SEQUENCES, STUDENT
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.steps import print_step
from operators.columns import PACKED, PACKS
from operators.train.pack_order import index_of
from tests.flows.train_results import a_result


def run_of(folder: Path, model: str, *overrides: str) -> Run:
    settings = [f"storage={folder}", f"student.model={model}", *overrides]
    return open_run(load_config(REPOSITORY / "configs" / "smoke.yaml", settings), GRAPH.specs)


def pack(run: Run, *row_ids: str) -> None:
    """Leave packs of one row each, as a run does."""
    packs = [
        {"row_ids": [row_id], "document_lengths": [2], "input_ids": [1, 2], "labels": [-100, 2], "outcome": PACKED}
        for row_id in row_ids
    ]
    table = pa.Table.from_pylist(packs, schema=PACKS)
    made_from = {"inputs": {}, "rows": [*row_ids]}
    run.store.make(PACKED_SEQUENCES, None, Recipe(lambda: ray.data.from_arrow(table)), made_from)


def train(run: Run, steps: int = 2) -> str:
    """Leave a student of these packs, as a run does; returns its version."""
    index, version = index_of(run.store.rows(PACKED_SEQUENCES, [None])), run.student_version()
    config = run.config.train.model_dump(mode="json")
    result = a_result(config, version=version, packs_digest=index.digest, steps=steps)
    run.store.make(STUDENT, None, Recipe(lambda: result), {"inputs": {}})
    return version


def printed(run: Run, step: int) -> list[str]:
    out = io.StringIO()
    assert print_step(run, step, out) == 0
    return out.getvalue().splitlines()


def test_a_step_of_a_storage_without_packs_is_refused(tmp_path: Path, tiny_model: str) -> None:
    with pytest.raises(ConfigError, match="--step"):
        printed(run_of(tmp_path, tiny_model), 0)


@pytest.mark.usefixtures("local_ray")
def test_the_rows_are_those_of_the_student_that_was_trained(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model)
    pack(run, "a", "b", "c", "d")
    words, step, *rows = printed(run, 0)
    assert words.startswith("no student is trained yet")
    assert step == "step 0, epoch 0: 2 rows; each of the 4 rows is in one step of an epoch"

    version = train(run)
    assert printed(run, 0) == [f"student {version}", step, *rows]
    assert sorted(rows + printed(run, 1)[2:]) == ["a", "b", "c", "d"]
    changed = run_of(tmp_path, tiny_model, "train.seed=1", "train.packs_per_step=1")
    assert printed(changed, 0) == [f"student {version}", step, *rows], "what was trained counts, not what is configured"
    with pytest.raises(ConfigError, match=rf"--step: 2 is none of student {version}, which took the steps 0 to 1$"):
        printed(run, 2)


@pytest.mark.usefixtures("local_ray")
def test_the_rows_of_packs_that_were_made_again_are_not_known(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model)
    pack(run, "a", "b")
    version = train(run)
    pack(run, "a", "b", "c")
    with pytest.raises(ConfigError, match=rf"was made again since student {version} was trained"):
        printed(run, 0)

    begun = Path(run.path("students", run.student_version()))
    begun.mkdir(parents=True)
    (begun / "metrics.jsonl").touch()
    words, *_ = printed(run, 0)
    assert words == f"student {begun.name}, whose training has not ended"


@pytest.mark.usefixtures("local_ray")
def test_steps_of_another_run_are_told_apart(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, f"train.resume_from={tmp_path}/other/step-00000001")
    pack(run, "a", "b", "c", "d")
    train(run, steps=1)
    assert printed(run, 1)[1].startswith("step 1, epoch 0: 2 rows")
    with pytest.raises(ConfigError, match=r"took the steps 1 to 1; the steps before are those of .*/step-00000001$"):
        printed(run, 0)
