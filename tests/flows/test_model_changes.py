"""Other weights at the path of a model make stale what the model was used for."""

import shutil
from pathlib import Path

import pytest

from cluster.storage import AssetStore
from flows.recycle_and_train import GRAPH
from flows.staleness import Staleness
from tests.flows.test_staleness import drop, finish_all, look


def stale(look: Staleness) -> dict[str, bool]:
    return {name: look.is_stale(name, "base" if spec.partitions_def else None) for name, spec in GRAPH.specs.items()}


def a_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_other_weights_at_the_same_path_make_stale_what_they_were_used_for(
    store: AssetStore, source: Path, tmp_path: Path
) -> None:
    drop(source, "a.jsonl", "one")
    model = f"student.model={a_model(tmp_path / 'model', bytes(100_000))}"
    finish_all(store, look(store, source, model), "base", {"": 1})
    assert not any(stale(look(store, source, model)).values())
    a_model(tmp_path / "model", bytes(99_999) + b"1")
    after = stale(look(store, source, model))
    apart = ("raw_instructions", "held_out", "instruction_reflections", "response_reflections", "release", "report")
    assert {name for name, found in after.items() if not found} == {*apart}, "some follow once the others are made"
    shutil.rmtree(tmp_path / "model")  # as on a machine that has only the daemon
    a_model(tmp_path / "model", bytes(100_000))
    assert not any(stale(look(store, source, model)).values())


def test_a_model_that_is_not_here_or_was_not_written_down_has_not_changed(
    store: AssetStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(source, "a.jsonl", "one")
    model = f"student.model={a_model(tmp_path / 'model', b'1')}"
    finish_all(store, look(store, source, model), "base", {"": 1})
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("flows.staleness.quick_revision", lambda _: "")
        assert not any(stale(look(store, source, model)).values())
        finish_all(store, look(store, source, model, "pack.max_tokens=100"), "base", {"": 1})
    written = look(store, source, model, "pack.max_tokens=100")
    assert not any(stale(written).values()), "an older version wrote no models"
    again = look(store, source, model, "pack.max_tokens=101").describe("packed_sequences", None)
    assert again["models"].keys() == {"student"}, "what is made again for another reason has them"
