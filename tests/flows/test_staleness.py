"""A change makes stale exactly what depends on it, as listed in the table in docs/architecture.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.manifest import Manifest, fingerprint_of
from cluster.storage import AssetStore
from flows.config import load_config
from flows.graph import (
    EVALUATION,
    HELD_OUT,
    INSTRUCTION_REFLECTIONS,
    PACKED_SEQUENCES,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    REPORT,
    SELECTED_INSTRUCTIONS,
    STUDENT,
)
from flows.recycle_and_train import GRAPH
from flows.retractions import Retractions
from flows.source_versions import source_files
from flows.staleness import Staleness, differences
from operators.stage import StageConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = REPOSITORY / "configs" / "smoke.yaml"
HEADING = "## What a changed key makes again"
NESTED = {"stages": {"judge": {"top_k": 7}}, "mix": ({"top_k": 7},)}  # values for keys that contain other keys


def keys_of(config: StageConfig, prefix: str = "") -> Iterator[str]:
    """The dotted name of every key of the configuration."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, StageConfig):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def varied(config: Any, key: str) -> Any:
    """The same configuration with another value for one key, valid or not."""
    name, _, rest = key.partition(".")
    value = getattr(config, name)
    return config.model_copy(update={name: varied(value, rest) if rest else NESTED.get(name, other(value))})


def other(value: Any) -> Any:
    if value is None:
        return 7
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, dict):
        return {**value, "x": "y"}
    return [*value, "x"]


def table() -> dict[str, set[str]]:
    """The assets that each key makes stale, read from docs/architecture.md."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    section = text.split(HEADING)[1].split("\n## ")[0]
    found: dict[str, set[str]] = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        keys, assets = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
        for key in keys:
            assert key not in found, f"{key} stands in two rows"
            found[key] = set(assets)
    return found


KEYS = list(keys_of(load_config(SMOKE, [])))


def look(store: AssetStore, source: Path, *overrides: str) -> Staleness:
    """A new view of the storage, as each process has."""
    config = load_config(SMOKE, [f"source.path={source}", *overrides])
    return Staleness(config, GRAPH.specs, store)


def finish(store: AssetStore, look: Staleness, asset: str, refresh: str | None, **held: Any) -> None:
    """Leave an asset as a finished run leaves it."""
    made_from = look.describe(asset, refresh)
    order = len(store.refreshes(asset)) + 1 if refresh else 0
    manifest = Manifest(order=order, fingerprint=fingerprint_of(made_from), made_from=made_from, **held)
    folder = Path(store.folder(asset, refresh))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()


def finish_all(store: AssetStore, look: Staleness, refresh: str, outcomes: dict[str, int]) -> None:
    for name, spec in GRAPH.specs.items():
        finish(store, look, name, refresh if spec.partitions_def is not None else None, outcomes=outcomes)


def drop(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"instruction": text, "output": text}) + "\n")


def test_the_table_has_every_key_once_and_no_other() -> None:
    assert sorted(set(KEYS) - set(table())) == [], "add a new key to the row of the assets that depend on it"
    assert sorted(set(table()) - set(KEYS)) == [], "these keys are gone"


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_makes_again_what_the_table_says(key: str, store: AssetStore, source: Path) -> None:
    drop(source, "a.jsonl", "one")
    config = load_config(SMOKE, [f"source.path={source}"])
    before, after = (Staleness(each, GRAPH.specs, store) for each in (config, varied(config, key)))
    if key == "source.path":  # a source that is not there has no files; this key is about where the same files are
        drop(source.with_name("elsewhere"), "a.jsonl", "one")
        after = look(store, source.with_name("elsewhere"))
    changed = {
        name
        for name, spec in GRAPH.specs.items()
        if before.describe(name, "base" if spec.partitions_def else None)["config"]
        != after.describe(name, "base" if spec.partitions_def else None)["config"]
    }
    assert changed == table()[key]


def test_what_is_made_from_a_stale_asset_is_stale_in_the_plan_and_made_from_what_is_there(
    store: AssetStore, source: Path
) -> None:
    drop(source, "a.jsonl", "one")
    finish_all(store, look(store, source), "base", {"original": 1})
    changed = look(store, source, "reflect.max_tokens=500")
    planned = {
        name
        for name, spec in GRAPH.specs.items()
        if changed.is_stale(name, "base" if spec.partitions_def else None, "base")
    }
    assert planned == set(GRAPH.specs) - {RAW_INSTRUCTIONS, HELD_OUT}
    assert changed.is_stale(INSTRUCTION_REFLECTIONS, "base")
    assert not changed.is_stale(PACKED_SEQUENCES, None), "its input is as it was until the input is made again"


def test_a_refresh_without_a_usable_row_trains_and_evaluates_nothing(store: AssetStore, source: Path) -> None:
    drop(source, "a.jsonl", "one")
    finish_all(store, look(store, source), "base", {"original": 1})
    nothing = {"dropped:seen_in_earlier_refresh": 4, "dropped:held_out": 2}
    for outcomes, retrains in ((nothing, False), ({"original": 1, "dropped:held_out": 1}, True)):
        for asset in (RAW_INSTRUCTIONS, HELD_OUT, RECYCLED_INSTRUCTIONS):
            held = {} if asset == HELD_OUT and not retrains else outcomes
            finish(store, look(store, source), asset, "second", outcomes=held)
        fresh = AssetStore(str(Path(store.folder("x", None)).parents[1]))
        now = look(fresh, source)
        assert [now.is_stale(name, None, "second") for name in (PACKED_SEQUENCES, STUDENT)] == [retrains] * 2
        assert now.is_stale(EVALUATION, None, "second") == retrains
        assert now.is_stale(REPORT, None, "second"), "the report counts all rows"


@pytest.mark.parametrize(
    ("policy", "trains_with"),
    [
        ([], {1: True}),
        (["release.retrain_after_rows=10"], {9: False, 10: True}),
        (["release.retrain_after_share=0.1"], {9: False, 10: True}),
        (["release.retrain_after_rows=50", "release.retrain_after_share=0.1"], {9: False, 10: True}),
    ],
)
def test_new_rows_wait_until_they_are_worth_a_training(
    store: AssetStore, source: Path, policy: list[str], trains_with: dict[int, bool]
) -> None:
    drop(source, "a.jsonl", "one")
    finish_all(store, look(store, source, *policy), "base", {"original": 100, "dropped:held_out": 5})
    for rows, trains in trains_with.items():
        for asset in (RAW_INSTRUCTIONS, HELD_OUT, RECYCLED_INSTRUCTIONS):
            outcomes = {"original": rows, "dropped:held_out": 1}
            finish(store, look(store, source, *policy), asset, "second", outcomes=outcomes)
        now = look(AssetStore(str(Path(store.folder("x", None)).parents[1])), source, *policy)
        assert now.is_stale(PACKED_SEQUENCES, None) == trains
        assert now.is_stale(EVALUATION, None, "second") == trains
        assert now.is_stale(STUDENT, None, "second") == trains
        assert now.is_stale("published_dataset", None), "rows are published at once"
        assert now.waiting_rows() == rows
        assert look(store, source, *policy, "pack.max_tokens=99").is_stale(PACKED_SEQUENCES, None)
        named = now.describe(PACKED_SEQUENCES, None)["inputs"]
        assert ("recycled_instructions[second]" in named) == trains


def test_an_earlier_refresh_made_again_makes_later_ones_stale_and_not_the_reverse(
    store: AssetStore, source: Path
) -> None:
    for key in ("z", "a", "m"):
        drop(source, f"{key}.jsonl", key)
        finish(store, look(store, source), RAW_INSTRUCTIONS, key, outcomes={"": 1})
    now = look(store, source)
    assert [now.files.earlier(key) for key in ("z", "a", "m", "new")] == [[], ["z"], ["z", "a"], ["z", "a", "m"]]
    assert not any(now.is_stale(RAW_INSTRUCTIONS, key) for key in ("z", "a", "m"))
    held = store.manifest(RAW_INSTRUCTIONS, "a")
    assert held is not None
    changed = held.model_copy(update={"fingerprint": "changed"})
    Path(store.folder(RAW_INSTRUCTIONS, "a"), "manifest.json").write_text(changed.model_dump_json())
    now = look(AssetStore(str(Path(store.folder("x", None)).parents[1])), source)
    assert not now.is_stale(RAW_INSTRUCTIONS, "z")
    assert now.is_stale(RAW_INSTRUCTIONS, "m")


def test_a_new_folder_renames_no_file(store: AssetStore, source: Path) -> None:
    drop(source, "2026-11/a.jsonl", "one")
    assert [file.name for file in source_files(str(source))] == ["2026-11/a.jsonl"]
    finish(store, look(store, source), RAW_INSTRUCTIONS, "base", outcomes={"": 1})
    drop(source, "2026-12/b.jsonl", "two")
    assert [file.name for file in look(store, source).files.files_of("second")] == ["2026-12/b.jsonl"]
    finish(store, look(store, source), RAW_INSTRUCTIONS, "second", outcomes={"": 1})
    drop(source, "c.jsonl", "three")
    assert [file.name for file in look(store, source).files.files_of("third")] == ["c.jsonl"]


def test_stored_rows_of_deleted_or_changed_files_are_kept(store: AssetStore, source: Path) -> None:
    drop(source, "a.jsonl", "one")
    drop(source, "b.jsonl", "two")
    finish(store, look(store, source), RAW_INSTRUCTIONS, "base", outcomes={"": 2})
    finish(store, look(store, source), RAW_INSTRUCTIONS, "later", outcomes={"": 0})
    (source / "a.jsonl").unlink()
    now = look(store, source)
    assert now.files.gone("base") == ["a.jsonl"]
    assert not now.is_stale(RAW_INSTRUCTIONS, "base"), "its stored rows are the archive of a.jsonl"
    drop(source, "b.jsonl", "another")
    finish(store, look(store, source), RAW_INSTRUCTIONS, "third", outcomes={"": 1})
    now = look(AssetStore(str(Path(store.folder("x", None)).parents[1])), source)
    assert now.files.gone("base") == ["a.jsonl", "b.jsonl"]
    assert not now.is_stale(RAW_INSTRUCTIONS, "base")
    (source / "b.jsonl").unlink()
    now = look(store, source)
    assert not now.is_stale(RAW_INSTRUCTIONS, "base"), "a source that is not there any more makes nothing stale"


def test_a_retracted_file_makes_its_refresh_stale_and_is_never_taken_again(store: AssetStore, source: Path) -> None:
    for name in ("a", "b"):
        drop(source, f"{name}.jsonl", name)
    finish(store, look(store, source), RAW_INSTRUCTIONS, "base", outcomes={"": 2})
    now = look(store, source)
    retractions = Retractions(str(Path(store.folder("x", None)).parents[1]))
    retractions.add([("a.jsonl", next(file.identity for file in now.files.there() if file.name == "a.jsonl"))])
    now = Staleness(load_config(SMOKE, [f"source.path={source}"]), GRAPH.specs, store, retractions=retractions)
    assert now.is_stale(RAW_INSTRUCTIONS, "base")
    assert [name for name, _ in now.describe(RAW_INSTRUCTIONS, "base")["files"]] == ["b.jsonl"]
    assert now.files.files_of(None) == []
    assert now.files.gone("base") == []
    described = now.describe(RAW_INSTRUCTIONS, "base")
    assert [name for name, _ in described["retracted"]] == ["a.jsonl"], "its refresh remembers what was taken out"
    finish(store, now, RAW_INSTRUCTIONS, "base", outcomes={"quarantined:empty": 1})
    assert now.describe(RAW_INSTRUCTIONS, "base") == described
    assert not now.is_stale(RAW_INSTRUCTIONS, "base")


def test_differences_name_what_changed() -> None:
    before = {"code": "1", "config": {"train": {"max_steps": 8}}, "inputs": {"packed_sequences": "a"}, "earlier": "x"}
    now = {"code": "1", "config": {"train": {"max_steps": 12}}, "inputs": {"packed_sequences": "b"}, "earlier": "y"}
    assert differences(before, now) == [
        "config.train.max_steps 8 -> 12",
        "an earlier refresh changed",
        "inputs.packed_sequences changed",
    ]


def test_teacher_calls_that_failed_make_their_asset_stale_until_they_are_made_again(
    store: AssetStore, source: Path
) -> None:
    drop(source, "a.jsonl", "one")
    now = look(store, source)
    finish_all(store, now, "base", {"original": 1})
    assert not now.is_stale(INSTRUCTION_REFLECTIONS, "base")
    finish(store, now, INSTRUCTION_REFLECTIONS, "base", metrics={"failed_calls": 3, "retryable_calls": 2})
    assert now.is_stale(INSTRUCTION_REFLECTIONS, "base")
    assert now.is_stale(SELECTED_INSTRUCTIONS, "base", planned="base")
    old = store.manifest(INSTRUCTION_REFLECTIONS, "base")
    assert old is not None
    assert differences(old.made_from, now.describe(INSTRUCTION_REFLECTIONS, "base")) == [
        "teacher calls that failed can be made again"
    ]
    finish(store, now, INSTRUCTION_REFLECTIONS, "base", metrics={"failed_calls": 1, "retryable_calls": 0})
    assert not now.is_stale(INSTRUCTION_REFLECTIONS, "base")
    assert now.is_stale(SELECTED_INSTRUCTIONS, "base"), "its input was made again"
