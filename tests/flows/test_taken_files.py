"""A refresh keeps its files, rows and place while it is unfinished: rows of files that are gone are not lost."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.bundles import tidy
from cluster.manifest import Manifest
from cluster.storage import AssetStore, Recipe
from flows.graph import RAW_INSTRUCTIONS
from flows.taken_files import TakenFiles
from operators.files.seals import sealed
from operators.read.config import ReadConfig
from tests.flows.flow_runs import flow_in, last_line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    return AssetStore(str(tmp_path / "storage"))


def look(store: AssetStore, source: Path) -> TakenFiles:
    """A new view of the source, as each process has."""
    return TakenFiles(ReadConfig(path=str(source)), store)


def finish(store: AssetStore, source: Path, refresh: str, outcome: str = "") -> None:
    """Leave raw instructions as a run leaves them."""
    files = [list(version) for version in look(store, source).described(refresh)]
    order = len(store.held_refreshes(RAW_INSTRUCTIONS)) + 1
    made = Manifest(order=order, fingerprint=refresh, made_from={"files": files}, outcomes={outcome: 1})
    folder = Path(store.folder(RAW_INSTRUCTIONS, refresh))
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(sealed(made))
    (folder / "_SUCCESS").touch()


def drop(source: Path, name: str, *texts: str) -> None:
    lines = [json.dumps({"instruction": f"Explain {text} to a child", "output": f"About {text}"}) for text in texts]
    (source / name).write_text("\n".join(lines))


def stored(tmp_path: Path) -> list[str]:
    """The instructions of the raw instructions of the refresh `base`."""
    folder = tmp_path / "storage" / "assets" / RAW_INSTRUCTIONS / "refresh=base"
    return sorted(text for file in folder.glob("*.parquet") for text in pq.read_table(file)["instruction"].to_pylist())


def names(files: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in files]


def test_an_unfinished_refresh_keeps_its_files_and_its_place(store: AssetStore, source: Path) -> None:
    for key in ("first", "second"):
        drop(source, f"{key}.jsonl", key)
        finish(store, source, key)
    store.invalidate(RAW_INSTRUCTIONS, "first")
    (source / "first.jsonl").unlink()
    now = look(store, source)
    assert names(now.taken("first")) == ["first.jsonl"]
    assert now.gone("first") == ["first.jsonl"]
    assert names(now.described("first")) == ["first.jsonl"]
    assert now.earlier("first") == [], (
        "the second refresh knows its rows as seen, so it does not know those of the second"
    )
    assert now.earlier("second") == []
    assert now.earlier("new") == ["second"]


def test_a_file_that_another_refresh_took_meanwhile_is_that_ones(store: AssetStore, source: Path) -> None:
    drop(source, "a.jsonl", "a")
    finish(store, source, "first")
    store.invalidate(RAW_INSTRUCTIONS, "first")
    drop(source, "b.jsonl", "b")
    assert [file.name for file in look(store, source).files_of("second")] == ["a.jsonl", "b.jsonl"]
    finish(store, source, "second")
    assert look(store, source).taken("first") == look(store, source).described("first") == []


def test_rows_that_could_not_be_used_keep_nothing(store: AssetStore, source: Path) -> None:
    drop(source, "a.jsonl", "a")
    finish(store, source, "first", "quarantined:empty_instruction")
    store.invalidate(RAW_INSTRUCTIONS, "first")
    drop(source, "a.jsonl", "repaired")
    now = look(store, source)
    assert (now.taken("first"), now.gone("first")) == ([], [])
    assert [file.name for file in now.files_of("first")] == ["a.jsonl"]


def test_a_bundled_refresh_that_is_unfinished_keeps_its_rows(store: AssetStore, local_ray: None) -> None:
    import ray

    for number in range(3):
        rows = pa.table({"row_id": [f"row-{number}"], "outcome": [""]})
        store.make(RAW_INSTRUCTIONS, f"day-{number}", Recipe(lambda rows=rows: ray.data.from_arrow(rows)), {})
    folder = store.folder(RAW_INSTRUCTIONS, None)
    filesystem = store._filesystem
    assert tidy(filesystem, RAW_INSTRUCTIONS, folder, most_loose=1) == 3
    store.invalidate(RAW_INSTRUCTIONS, "day-1")
    tidy(filesystem, RAW_INSTRUCTIONS, folder, most_loose=1)  # it drops the rows that are no refresh's
    assert store.refreshes(RAW_INSTRUCTIONS) == ["day-0", "day-2"]
    assert store.held_refreshes(RAW_INSTRUCTIONS) == ["day-0", "day-1", "day-2"]
    held = store.held_rows(RAW_INSTRUCTIONS, "day-1", "")
    assert [row["row_id"] for row in held.take_all()] == ["row-1"]


def test_a_run_after_a_failed_check_keeps_the_rows_of_files_that_are_gone(
    tmp_path: Path, source: Path, tiny_model: str, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = flow_in(tmp_path, tiny_model)
    settings = [f"source.path={source}", "--select", RAW_INSTRUCTIONS]
    drop(source, "a.jsonl", "rain", "snow")
    assert flow(*settings)[0] == 0
    assert flow(*settings, "source.held_out_fraction=0.999999")[0] == 2, "no row survives, so the check fails"
    (source / "a.jsonl").unlink()
    drop(source, "b.jsonl", "hail")
    assert flow(*settings)[0] == 0
    assert stored(tmp_path) == ["Explain hail to a child", "Explain rain to a child", "Explain snow to a child"]
    folder = tmp_path / "storage" / "assets" / RAW_INSTRUCTIONS / "refresh=base"
    (folder / "_SUCCESS").unlink()
    for file in folder.glob("*.parquet"):
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(bytes(content))
    capsys.readouterr()
    assert flow(*settings)[0] == 1
    assert "the rows of a.jsonl are nowhere else: restore it from a backup, or take them out by --retract" in last_line(
        capsys
    )
    assert flow(settings[0], "--retract", "a.jsonl")[0] == 0
    assert stored(tmp_path) == ["Explain hail to a child"]
