"""A storage where a run would delete what is not its own, or read what it wrote, is refused before anything is paid."""

from pathlib import Path

import pytest

from cluster.manifest import Manifest
from flows.config import load_config
from flows.graph import PUBLISHED_DATASET
from flows.preflight import preflight
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.storage_findings import damage_findings, place_findings
from flows.student_files import note_checksums
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss
from operators.files.atomic import put_file
from operators.files.checksums import checksums_of
from operators.files.copies import files_below
from operators.publish.publish import Published
from tests.flows.flow_runs import SMOKE, write_source


def look(*overrides: str) -> Run:
    return open_run(load_config(Path(SMOKE), list(overrides)), GRAPH.specs)


def test_a_published_folder_of_somebody_else_is_refused(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.preflight.cluster_nodes", list)  # needs no Ray
    monkeypatch.setattr("flows.preflight.exposed_address", lambda: None)
    put_file(f"{tmp_path}/home/published/thesis.tex", "years")
    write_source(tmp_path / "source.jsonl", 20)
    run = look(f"storage={tmp_path}/home", f"source.path={tmp_path}/source.jsonl", f"student.model={tiny_model}")
    fatal = [str(finding) for finding in preflight(run, "base", ["raw_instructions"]) if finding.key == "storage"]
    assert fatal == [
        f"storage: {tmp_path}/home/published was not published by a run (thesis.tex), and a publication would delete "
        "it; move it away, or give another storage=<folder>"
    ]


@pytest.mark.parametrize(
    ("source", "storage"),
    [
        ("data", "data/runs"),
        ("data", "data"),
        ("data/**/*.jsonl", "data/deep/runs"),
        ("data/*/*.json", "data/runs"),
        ("link", "data/runs"),
        ("runs/published", "runs"),
        ("runs/published/alpaca/*.jsonl", "runs"),
        ("runs/published/alpaca/0.jsonl", "runs"),
    ],
)
def test_a_run_that_would_read_what_it_wrote_is_refused(tmp_path: Path, source: str, storage: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    run = look(f"storage={tmp_path}/{storage}", f"source.path={tmp_path}/{source}")
    [finding] = place_findings(run)
    assert finding.fatal
    assert str(finding).startswith(f"source.path: {tmp_path}/{source} includes files that a run writes to storage=")


@pytest.mark.parametrize(
    ("source", "storage"),
    [
        ("data", "runs"),
        ("data", "data-2"),
        ("data", "data/.runs"),
        ("data/*.jsonl", "data/runs"),
        ("runs/incoming", "runs"),
        ("data/runs.jsonl", "data/runs"),
    ],
)
def test_a_storage_beside_the_source_is_not(tmp_path: Path, source: str, storage: str) -> None:
    assert place_findings(look(f"storage={tmp_path}/{storage}", f"source.path={tmp_path}/{source}")) == []


def test_data_that_is_mixed_in_or_kept_apart_counts_too(tmp_path: Path) -> None:
    others = [f"pack.mixture.general={tmp_path}/data", f"decontaminate.files=[{tmp_path}/data/**]"]
    run = look(f"storage={tmp_path}/data/runs", f"source.path={tmp_path}/source", *others)
    assert {finding.key for finding in place_findings(run)} == {"pack.mixture.general", "decontaminate.files"}


def test_in_a_bucket_too(bucket: str) -> None:
    assert [finding.key for finding in place_findings(look(f"storage={bucket}/a/runs", f"source.path={bucket}/a"))] == [
        "source.path"
    ]
    assert place_findings(look(f"storage={bucket}/a/runs", f"source.path={bucket}/a/run")) == []


def published(run: Run) -> None:
    """Leave published data as a finished run leaves it."""
    for name in ("README.md", "alpaca/0.jsonl"):
        put_file(run.path("published", name), f"text of {name}")
    folder = run.path("published")
    value = Published(folder=folder, rows=1, alpaca_rows=1, files=checksums_of(folder, files_below(folder)))
    place = run.store.folder(PUBLISHED_DATASET, None)
    put_file(f"{place}/manifest.json", Manifest(fingerprint="0", value=value.model_dump()).model_dump_json())
    put_file(f"{place}/_SUCCESS", "")


def test_the_doctor_finds_a_flipped_bit_in_published_data_and_in_the_released_student(tmp_path: Path) -> None:
    run = look(f"storage={tmp_path}/s", f"source.path={tmp_path}/source")
    assert damage_findings(run) == []
    published(run)
    put_file(run.path("students", "v1", "model.safetensors"), "weights")
    note_checksums(run.path("students", "v1"))
    evaluation = Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=1.9))
    ReleaseHistory(run.config.storage).record("released", "v1", evaluation, ())
    assert damage_findings(run) == []
    put_file(run.path("published", "alpaca/0.jsonl"), "text of alpaca/1.jsonl")
    put_file(run.path("students", "v1", "model.safetensors"), "weighty")
    data, student = map(str, damage_findings(run))
    assert data == (
        f"published_dataset: {tmp_path}/s/published: alpaca/0.jsonl are not what was published; delete "
        f"{tmp_path}/s/assets/published_dataset/_SUCCESS and run again"
    )
    assert student.startswith(f"student: {tmp_path}/s/students/v1: model.safetensors are not what the training wrote")
    assert not any(finding.fatal for finding in damage_findings(run)), "a run makes neither worse"


def test_the_doctor_names_a_pointer_that_it_cannot_read(tmp_path: Path) -> None:
    put_file(f"{tmp_path}/s/released.json", "{}")
    [finding] = damage_findings(look(f"storage={tmp_path}/s", f"source.path={tmp_path}/source"))
    assert "released.json holds no release record" in str(finding)


def test_data_that_an_older_version_published_is_not_checked(tmp_path: Path) -> None:
    run = look(f"storage={tmp_path}/s", f"source.path={tmp_path}/source")
    place = run.store.folder(PUBLISHED_DATASET, None)
    put_file(f"{place}/manifest.json", Manifest(fingerprint="0", value={"folder": "x", "rows": 1}).model_dump_json())
    put_file(f"{place}/_SUCCESS", "")
    assert damage_findings(run) == []
