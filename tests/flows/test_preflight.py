"""Problems are found before any call is paid and named by their keys, and only fatal ones refuse the run."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.lease import lease
from cluster.manifest import Manifest, fingerprint_of
from flows.config import load_config
from flows.graph import RAW_INSTRUCTIONS, STUDENT
from flows.placement import GIB
from flows.preflight import (
    PreflightError,
    _cluster_findings,
    _hub_findings,
    _model_findings,
    _package_findings,
    _resume_findings,
    _source_findings,
    _storage_findings,
    require_sound,
    student_needs,
)
from flows.recycle_and_train import GRAPH
from flows.refresh_requests import GivenUp, Request
from flows.run import Run, open_run
from operators.stage import Finding
from operators.student.doctor import examine_student
from operators.train.checkpoint import MARKER, CheckpointSpec, marker_of, write_json

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
Usage = namedtuple("Usage", "total used free")


def look(tmp_path: Path, *overrides: str) -> Run:
    paths = [f"storage={tmp_path / 'storage'}", f"source.path={tmp_path / 'source'}"]
    return open_run(load_config(SMOKE, [*paths, *overrides]), GRAPH.specs)


def drop(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / "source" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"instruction": text, "output": text}) + "\n")
    return file


def take(run: Run, refresh: str) -> None:
    """Leave the raw instructions of a refresh as a finished run leaves them."""
    made_from = run.staleness.describe(RAW_INSTRUCTIONS, refresh)
    folder = Path(run.store.folder(RAW_INSTRUCTIONS, refresh))
    folder.mkdir(parents=True)
    manifest = Manifest(fingerprint=fingerprint_of(made_from), made_from=made_from, outcomes={"": 1})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()


def test_only_fatal_findings_refuse_a_run_and_each_is_one_line() -> None:
    warning, fatal = Finding("cluster", "is slow", fatal=False), Finding("storage", "is full")
    require_sound([warning])
    with pytest.raises(PreflightError, match=r"^storage: is full\nstudent.model: is gone$"):
        require_sound([fatal, warning, Finding("student.model", "is gone")])


@pytest.mark.parametrize(
    ("address", "mode", "allowed", "fatal"),
    [
        ("10.0.0.7:6379", "", "false", [True]),
        ("10.0.0.7:6379", "", "true", [False]),
        ("10.0.0.7:6379", "token", "false", []),
        ("127.0.0.1:6379", "", "false", []),
    ],
)
def test_a_cluster_that_runs_commands_for_anyone_is_refused(
    address: str, mode: str, allowed: str, fatal: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr("cluster.runtime.ray.get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    node = {"Alive": True, "NodeManagerAddress": address.partition(":")[0]}
    monkeypatch.setattr("cluster.runtime.ray.nodes", lambda: [node])
    found = _cluster_findings(look(tmp_path, f"allow_open_ray={allowed}").config)
    assert [finding.fatal for finding in found] == fatal
    assert all("start it with RAY_AUTH_MODE=token, as in the README" in finding.text for finding in found)


def test_a_checkpoint_that_is_not_there_is_found_before_the_teacher_is_paid(tmp_path: Path) -> None:
    for name in ("", "step-00000002"):
        if name:
            (tmp_path / name).mkdir()
        run = look(tmp_path, f"train.resume_from={tmp_path / 'step-00000002'}")
        [found] = _resume_findings(run.config)
        assert found.fatal
        assert "step-00000002 is not a complete checkpoint" in str(found)
    assert _resume_findings(look(tmp_path).config) == []


@pytest.mark.parametrize(("precision", "written"), [("bf16", 1), ("fp32", 0)])
def test_a_checkpoint_is_compared_with_the_stage_that_is_used_not_with_the_configured_one(
    tmp_path: Path, precision: str, written: int
) -> None:
    for stage in (0, 1):
        folder = tmp_path / f"step-{stage:08d}"
        folder.mkdir()
        spec = CheckpointSpec("of another run", world_size=1, zero_stage=stage)
        write_json(folder / MARKER, marker_of(stage, spec, {}))
        keys = [f"train.resume_from={folder}", "train.zero_stage=0", f"train.precision={precision}"]
        found = [str(one) for one in _resume_findings(look(tmp_path, *keys).config)]
        assert bool(found) == (stage != written), found


def test_a_package_that_training_needs_is_missed_before_the_teacher_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = look(
        tmp_path, "train.optimizer=adamw_8bit", "train.trackers=[wandb]", "train.quantize=4bit", "train.lora.r=4"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = _package_findings(run.config)
    assert [finding.key for finding in found] == ["train.optimizer", "train.quantize", "train.trackers"]
    assert all(finding.fatal and "pip install" in finding.text for finding in found)
    assert _package_findings(look(tmp_path).config) == []


def test_a_hub_without_a_token_is_refused_before_anything_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = look(tmp_path, "publish.hub_repo=me/data").config
    [found] = _hub_findings(config)
    assert found.fatal
    assert "me/data cannot be pushed to: the environment has no HF_TOKEN" in str(found)
    monkeypatch.setenv("HF_TOKEN", "x")
    assert _hub_findings(config) == _hub_findings(look(tmp_path).config) == []


def test_a_storage_that_another_run_holds_is_a_warning_and_nothing_is_made_by_looking(tmp_path: Path) -> None:
    run = look(tmp_path)
    assert _storage_findings(run, holds_lease=False) == []
    assert not (tmp_path / "storage").exists()
    with lease(run.config.storage):
        [found] = _storage_findings(run, holds_lease=False)
        assert not found.fatal
        assert "another run is writing" in found.text
        assert _storage_findings(run, holds_lease=True) == []


def test_a_disk_too_small_for_the_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [2 * GIB], "data_offsets": [0, 2 * GIB]}}).encode()
    with (model / "model.safetensors").open("wb") as weights:  # a sparse file
        weights.write(len(header).to_bytes(8, "little") + header)
        weights.truncate(8 + len(header) + 2 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9 * GIB, 8 * GIB, GIB))
    [found] = _storage_findings(look(tmp_path, f"student.model={model}"), holds_lease=True)
    assert found.fatal
    assert "training writes about 2.0 GiB, 1.0 GiB are free at" in found.text


def test_a_source_is_judged_by_what_the_refresh_has_and_had(tmp_path: Path) -> None:
    [found] = _source_findings(look(tmp_path), "base", [])
    assert found.fatal
    assert found.key == "source.path"
    first = drop(tmp_path, "a.jsonl", "one")
    assert _source_findings(look(tmp_path), "base", []) == []
    take(look(tmp_path), "base")
    [found] = _source_findings(look(tmp_path), "second", [])
    assert "has no file that no other refresh has taken" in found.text
    assert _source_findings(look(tmp_path), "second", [STUDENT]) == []
    drop(tmp_path, "b.jsonl", "two")
    first.unlink()
    [found] = _source_findings(look(tmp_path), "base", [])
    assert not found.fatal
    assert "a.jsonl of refresh base are gone or changed" in found.text


def test_a_refresh_that_must_be_made_again_keeps_the_rows_of_files_that_are_gone(tmp_path: Path) -> None:
    file = drop(tmp_path, "a.jsonl", "one")
    take(look(tmp_path), "base")
    file.unlink()
    for now in (look(tmp_path), look(tmp_path, "source.max_chars=99")):
        [found] = _source_findings(now, "base", [])
        assert not found.fatal
        assert "the rows that were read from them stay; --retract FILE takes them out" in found.text


def test_a_refresh_that_was_given_up_is_named_in_every_plan(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "one")
    take(look(tmp_path), "base")
    dead = GivenUp(at="", attempts=3, reason="the disk is full")
    look(tmp_path).requests.put(Request(key="lost", given_up=dead))
    [found] = _source_findings(look(tmp_path), "base", [])
    assert not found.fatal
    assert "refresh lost was given up after 3 attempts: the disk is full" in found.text


def test_the_student_needs_what_training_asks_of_it() -> None:
    exact, hyper = (load_config(SMOKE, [f"train.attention={name}"]) for name in ("sdpa", "hyper_attention"))
    assert student_needs(exact).hyper_attention_layers is None
    assert student_needs(hyper).hyper_attention_layers == "all"
    assert student_needs(exact).max_tokens == exact.pack.max_tokens
    assert (student_needs(exact).chat_template, student_needs(exact).template_file) == ("", "")
    assert student_needs(exact).neftune_alpha == exact.train.neftune_alpha > 0


def test_a_template_that_is_missing_empty_or_wrong_is_refused_before_anything_is_paid(
    tmp_path: Path, tiny_model: str, own_template: str
) -> None:
    file = tmp_path / "mine.jinja"
    keys = (f"student.chat_template={file}", f"student.model={tiny_model}")
    for text, told in ((None, "does not exist"), ("", "is empty"), ("{% for %}", "mend the file"), (own_template, "")):
        if text is not None:
            file.write_text(text)
        run = look(tmp_path, *keys)
        found = _model_findings(run) or examine_student(run.student, student_needs(run.config))
        assert all(one.fatal and one.key == "student.chat_template" and str(file) in one.text for one in found), found
        assert [told in one.text for one in found] == [True] * bool(told)


def test_files_of_unknown_formats_are_named_and_a_source_out_of_reach_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(tmp_path, "a.jsonl", "one")
    (tmp_path / "source" / "book.xlsx").write_bytes(b"PK")
    (finding,) = _source_findings(look(tmp_path), "base", [])
    assert "book.xlsx: not read" in str(finding)
    assert not finding.fatal

    def fail(path: str) -> str:
        raise OSError(path)

    monkeypatch.setattr("flows.preflight.unknown_files", fail)
    assert _source_findings(look(tmp_path), "base", []) == []
