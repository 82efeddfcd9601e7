"""What a run derives for its assets from the configuration alone, without cluster or engine."""

from pathlib import Path

import pytest

from flows.config import ConfigError, load_config
from flows.recycle_and_train import GRAPH
from flows.releases import models_of
from flows.run import REFLECTIONS, Run, open_run
from operators.models import model_revision
from tests.flows.flow_runs import SMOKE


def run_of(folder: Path, model: str, *overrides: str) -> Run:
    settings = [f"storage={folder}/storage", f"source.path={folder}/source", f"student.model={model}", *overrides]
    return open_run(load_config(Path(SMOKE), settings), GRAPH.specs)


def test_everything_of_a_run_lies_below_its_storage(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model)
    assert run.path("ledger") == f"{tmp_path}/storage/ledger"
    assert all(place.startswith(f"{tmp_path}/storage/") for place in (run.dagster_home, run.logs))
    assert run.scorer.student == run.student == tiny_model


def test_a_relative_storage_is_anchored(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_of(tmp_path, tiny_model, "storage=here").path("x") == f"{tmp_path}/here/x"
    with pytest.raises(ConfigError, match="storage"):
        run_of(tmp_path, tiny_model, "storage=nothing://here")


def test_a_refresh_has_the_files_that_no_refresh_took(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "source").mkdir()
    run = run_of(tmp_path, tiny_model)
    with pytest.raises(ValueError, match=r"source"):
        run.source("2026-11-27")
    (tmp_path / "source" / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    assert run_of(tmp_path, tiny_model).source("2026-11-27") == [f"{tmp_path}/source/a.jsonl"]
    assert run.earlier("2026-11-27") is None
    assert run.archived("2026-11-27") is None
    assert run.staleness.files.taken("2026-11-27") == []


def test_with_reparse_both_reflections_are_made_again_from_the_ledger_alone(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []
    monkeypatch.setattr("flows.run.Ledger", lambda *_, offline, prompts: opened.append(offline))
    config = load_config(Path(SMOKE), [f"storage={tmp_path}", f"student.model={tiny_model}"])
    for reparse in (False, True):
        run = open_run(config, GRAPH.specs, reparse=reparse)
        run.asking()
        assert run.asset_io()._made_again == (REFLECTIONS if reparse else frozenset())
    assert opened == [False, True]


def test_control_tokens_of_every_model_that_reads_texts_are_known(tmp_path: Path, tiny_model: str) -> None:
    assert {"<|im_start|>", "<|im_end|>"} <= run_of(tmp_path, tiny_model).special_tokens


def test_the_version_of_a_student_changes_with_what_it_is_trained_with(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    version = run_of(tmp_path, tiny_model).student_version()
    assert run_of(tmp_path, tiny_model).student_version() == version
    assert run_of(tmp_path, tiny_model, "train.learning_rate=1e-3").student_version() != version
    assert run_of(tmp_path, tiny_model, "train.num_workers=2").student_version() == version


def test_the_student_s_template_is_named_from_here_and_belongs_to_what_the_student_is(
    tmp_path: Path, tiny_model: str, own_template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text(own_template)
    plain, given = run_of(tmp_path, tiny_model), run_of(tmp_path, tiny_model, "student.chat_template=mine.jinja")
    assert given.config.student.chat_template == f"{tmp_path}/mine.jinja"
    assert (plain.scorer.chat_template, given.scorer.chat_template) == ("", own_template)
    assert models_of(given, "v1", "new").chat_template == own_template
    assert plain.student_revision == model_revision(tiny_model) != given.student_revision
