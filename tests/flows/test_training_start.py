"""What a training starts from, and the general data that it may learn."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from cluster.files import StorageError
from cluster.storage import Recipe
from flows.config import load_config
from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.student_files import note_checksums
from flows.training_start import rows_to_pack, starting_student
from operators.columns import ACTIVE, HELD_OUT, ORIGINAL, RAW, RECYCLED, conform
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss
from operators.read.drop_contaminated import CONTAMINATED
from operators.read.drop_seen import SEEN
from operators.read.read_instructions import DUPLICATE, read_instructions
from operators.train.mixture import GENERAL
from tests.flows.flow_runs import SMOKE


def run_of(folder: Path, model: str, *overrides: str) -> Run:
    settings = [f"storage={folder}/storage", f"source.path={folder}/source", f"student.model={model}", *overrides]
    return open_run(load_config(Path(SMOKE), settings), GRAPH.specs)


def released(run: Run, version: str) -> str:
    """Add a released student that started as configured."""
    folder = run.path("students", version)
    starting_student(run, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "config.json", "model.safetensors"):
        (Path(folder) / name).write_text("{}")
    loss = HeldOutLoss(base=2.0, student=1.9)
    ReleaseHistory(run.config.storage).record("released", version, Evaluation(held_out_loss=loss), ())
    return folder


def test_the_base_model_is_the_start_unless_the_released_student_is_asked_for(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    first = released(run, "v1")
    assert starting_student(run, run.path("students", "v2")) == (first, "")
    plain = run_of(tmp_path, tiny_model)
    assert starting_student(plain, plain.path("students", "v3")) == (tiny_model, "")
    assert not Path(plain.path("students", "v3")).exists()


def test_a_training_keeps_its_start_whatever_is_released_meanwhile(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    first = released(run, "v1")
    second = run.path("students", "v2")
    assert starting_student(run, second).student == first
    released(run, "v9")
    assert starting_student(run, second).student == first
    assert starting_student(run, run.path("students", "v3")).student == run.path("students", "v9")


def test_a_damaged_student_is_no_start_and_the_damage_is_named(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    folder = released(run, "v1")
    note_checksums(folder)
    again = run.path("students", "v2")
    assert starting_student(run, again).student == folder
    (Path(folder) / "model.safetensors").write_text("[]")
    for student in (again, run.path("students", "v3")):  # one whose start is noted, and a new one
        with pytest.raises(StorageError, match=r"^student: .*v1: model.safetensors are not what the training wrote"):
            starting_student(run, student)


def test_a_student_of_another_base_model_is_not_the_start(tmp_path: Path, tiny_model: str, demo_model: str) -> None:
    released(run_of(tmp_path, tiny_model, "train.start=released"), "v1")
    run = run_of(tmp_path, demo_model, "train.start=released")
    start = starting_student(run, run.path("students", "v2"))
    assert start.student == demo_model
    assert start.note == (
        "train.start: released, but the released student v1 was made from another base model or chat template; "
        "training started from the base model"
    )


def test_a_student_of_another_chat_template_is_not_the_start(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "mine.jinja").write_text("a template")
    given = ("train.start=released", f"student.chat_template={tmp_path / 'mine.jinja'}")
    first = released(run_of(tmp_path, tiny_model, "train.start=released"), "v1")
    run = run_of(tmp_path, tiny_model, *given)
    start = starting_student(run, run.path("students", "v2"))
    assert start.student == tiny_model != first
    assert "or chat template" in start.note
    second = released(run, "v3")
    assert starting_student(run_of(tmp_path, tiny_model, *given), run.path("students", "v4")) == (second, "")


def test_a_student_whose_weights_were_deleted_is_not_the_start(tmp_path: Path, tiny_model: str) -> None:
    import shutil

    run = run_of(tmp_path, tiny_model, "train.start=released")
    shutil.rmtree(released(run, "v1"))
    start = starting_student(run, run.path("students", "v2"))
    assert start.student == tiny_model
    assert "the weights of the released student v1 are deleted" in start.note
    assert starting_student(run, run.path("students", "v2")) == start, "a resumed training has the same note"


def test_a_storage_without_a_released_student_says_so(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    start = starting_student(run, run.path("students", "v1"))
    assert start.student == tiny_model
    assert "no student is released yet" in start.note


def test_a_student_saved_as_adapters_cannot_be_the_start(tmp_path: Path, tiny_model: str) -> None:
    from flows.config import ConfigError

    with pytest.raises(ConfigError, match=r"start: released with lora.merge: false"):
        run_of(tmp_path, tiny_model, "train.start=released", "train.lora.r=4", "train.lora.merge=false")


QUESTION = "Explain how a heat pump warms a house in winter although it is cold outside"
OTHERS = [f"Write sentence number {number} about rivers, hills and small towns" for number in range(6)]


def records(path: Path, *instructions: str) -> Path:
    lines = [json.dumps({"instruction": text, "input": "", "output": f"Answer to {text}."}) for text in instructions]
    path.write_text("\n".join(lines) + "\n")
    return path


def stored(run: Run, source: Path) -> None:
    """Make the source's rows as the assets of a refresh; the row with QUESTION is held out."""
    rows = pa.concat_tables(
        ray.get(read_instructions(run.config.source, [str(source)], run.special_tokens).to_arrow_refs())
    )
    held_out = [text == QUESTION for text in rows["instruction"].to_pylist()]
    raw = pa.array([HELD_OUT if held else ACTIVE for held in held_out], pa.string())
    final = pa.array([HELD_OUT if held else ORIGINAL for held in held_out], pa.string())
    texts = {"final_instruction": rows["instruction"], "final_response": rows["response"]}
    for asset, outcome, schema in ((RAW_INSTRUCTIONS, raw, RAW), (RECYCLED_INSTRUCTIONS, final, RECYCLED)):
        columns: dict[str, Any] = {name: rows[name] for name in rows.column_names if name != "outcome"}
        table = conform(pa.table({**columns, **texts, "outcome": outcome}), schema)
        run.store.make(asset, "a", Recipe(lambda table=table: ray.data.from_arrow(table)), {"files": [], "inputs": {}})


@pytest.mark.usefixtures("local_ray")
def test_general_data_is_kept_from_what_the_student_is_evaluated_on(tmp_path: Path, tiny_model: str) -> None:
    source = records(tmp_path / "source.jsonl", QUESTION, *OTHERS)
    benchmark = records(
        tmp_path / "benchmark.jsonl", "Name the largest planet that circles our sun and say how large it is"
    )
    asked = f"Please, {QUESTION}"  # a new record, but the text of one that is held out
    planet = "name the largest planet that circles our sun and say how large it is"
    usable = [f"Translate phrase {number} of the poem on moonlight into plain French" for number in range(4)]
    general = records(tmp_path / "general.jsonl", QUESTION, asked, planet, OTHERS[0], *usable, usable[0])
    general.write_text(f"{general.read_text()}not json\n")
    settings = [
        f"pack.mixture.general={general}",
        "pack.mixture.general_share=0.9",
        f"decontaminate.files=[{benchmark}]",
    ]
    run = run_of(tmp_path, tiny_model, *settings)
    stored(run, source)
    counted: dict[str, int] = {}
    rows = rows_to_pack(run, run.store.rows(RECYCLED_INSTRUCTIONS, ["a"]), counted).take_all()
    assert counted == {
        ACTIVE: 4, CONTAMINATED: 2, SEEN: 2, DUPLICATE: 1, "quarantined:malformed_json": 1,
    }  # fmt: skip
    drawn = {row["final_instruction"] for row in rows if row["row_id"].startswith(GENERAL)}
    assert drawn == set(usable)
