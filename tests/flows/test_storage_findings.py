"""A storage where a run would delete what is not its own, or read what it wrote, is refused before anything is paid."""

from pathlib import Path

import pytest

from flows.config import load_config
from flows.preflight import preflight
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.storage_findings import place_findings
from operators.files.atomic import put_file
from tests.flows.flow_runs import SMOKE, write_source


def look(*overrides: str) -> Run:
    return open_run(load_config(Path(SMOKE), list(overrides)), GRAPH.specs)


def test_a_published_folder_of_somebody_else_is_refused(tmp_path: Path, tiny_model: str) -> None:
    put_file(f"{tmp_path}/home/published/thesis.tex", "years")
    write_source(tmp_path / "source.jsonl", 20)
    run = look(f"storage={tmp_path}/home", f"source.path={tmp_path}/source.jsonl", f"student.model={tiny_model}")
    fatal = [str(finding) for finding in preflight(run, "base") if finding.fatal]
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
