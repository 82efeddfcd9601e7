"""A log of Parquet files before and after cut-off files have been set aside, without Ray."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators import parquet_log
from operators.parquet_log import BROKEN, DISCOUNTED, ParquetLog, write_whole


@pytest.mark.parametrize("left", [0, 4, 50, -8, -1], ids=["nothing", "the start", "some", "no end", "all but a byte"])
def test_a_file_that_is_cut_off_is_left_out_by_every_reader_and_then_set_aside(tmp_path: Path, left: int) -> None:
    whole, cut_off = (Path(write_whole(f"{tmp_path}/stage", pa.table({"n": [n, n]}))) for n in (1, 2))
    cut_off.write_bytes(cut_off.read_bytes()[:left])
    log = ParquetLog(str(tmp_path))
    assert log.of("stage") == [str(whole)]
    assert log.count("stage") == 2
    assert [batch["n"].to_pylist() for batch in log.batches("stage", ["n"])] == [[1, 1]]
    assert log.tidy("stage") == 1
    assert {file.name for file in (tmp_path / "stage").iterdir()} == {whole.name, f"{cut_off.name}{BROKEN}"}


def test_what_a_killed_writer_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    folder = Path(write_whole(f"{tmp_path}/stage", pa.table({"n": [1]}))).parent
    old, young, other = (folder / name for name in (".a.1.unfinished", ".b.2.unfinished", ".c.parquet"))
    for file in (old, young, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (1, 1))
    assert ParquetLog(str(tmp_path)).tidy("stage") == 0
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def numbers(log: ParquetLog) -> list[int]:
    return sorted(number for batch in log.batches("stage", ["n"]) for number in batch["n"].to_pylist())


def small_files(folder: Path, count: int) -> list[str]:
    return sorted(write_whole(f"{folder}/stage", pa.table({"n": [n]})) for n in range(count))


def test_a_merge_that_is_cut_off_counts_no_record_twice_and_its_leftover_is_deleted(tmp_path: Path) -> None:
    files = [Path(file) for file in small_files(tmp_path, 4)]
    contents = [file.read_bytes() for file in files]
    parquet_log._merge_files(f"{tmp_path}/stage", [str(file) for file in files])
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)  # as if the merge had been killed before it deleted them
    assert len(list((tmp_path / "stage").iterdir())) == 5  # the records are there twice
    for log in (ParquetLog(str(tmp_path)), ParquetLog(str(tmp_path))):
        assert numbers(log) == [0, 1, 2, 3]
        assert log.count("stage") == 4
        assert log.cut_off("stage") == []
        assert log.tidy("stage") == 0
    [merged] = (tmp_path / "stage").iterdir()
    assert sorted(pq.read_table(merged)["n"].to_pylist()) == [0, 1, 2, 3]


def test_a_merge_that_is_tried_again_writes_nothing_a_second_time(tmp_path: Path) -> None:
    files = small_files(tmp_path, 3)
    parquet_log._merge_files(f"{tmp_path}/stage", files)
    [merged] = (tmp_path / "stage").iterdir()
    parquet_log._merge_files(f"{tmp_path}/stage", files)  # as Ray does when the worker dies after the first
    assert list((tmp_path / "stage").iterdir()) == [merged]
    assert numbers(ParquetLog(str(tmp_path))) == [0, 1, 2]


def test_merged_files_are_merged_again_with_files_that_have_other_columns(tmp_path: Path) -> None:
    parquet_log._merge_files(f"{tmp_path}/stage", small_files(tmp_path, 2))
    write_whole(f"{tmp_path}/stage", pa.table({"n": [7], "later": ["x"]}))
    parquet_log._merge_files(f"{tmp_path}/stage", ParquetLog(str(tmp_path)).of("stage"))
    [merged] = (tmp_path / "stage").iterdir()
    assert sorted(pq.read_table(merged).to_pylist(), key=lambda row: row["n"]) == [
        {"n": 0, "later": None},
        {"n": 1, "later": None},
        {"n": 7, "later": "x"},
    ]


def test_no_wanted_key_gives_no_record(tmp_path: Path, local_ray: None) -> None:
    write_whole(f"{tmp_path}/stage", pa.table({"key": ["a", "b"], "n": [1, 2]}))
    log = ParquetLog(str(tmp_path))
    for asked in (ray.data.from_arrow(pa.table({"key": pa.array([], pa.string())})), ray.data.from_items([])):
        found, about = log.read_for(asked, 0, "stage", ["key", "n"])
        assert (found.take_all(), about) == ([], 0)
    found, _ = log.read_for(ray.data.from_arrow(pa.table({"key": ["b"]})), 1, "stage", ["key", "n"])
    assert found.take_all() == [{"key": "b", "n": 2}]


def numbers_of_all(log: ParquetLog) -> list[int]:
    return sorted(number for batch in log.batches("stage", ["n"], discounted=True) for number in batch["n"].to_pylist())


def test_discounted_records_are_read_only_by_who_asks_for_them(tmp_path: Path) -> None:
    log, files = ParquetLog(str(tmp_path)), small_files(tmp_path, 4)
    log.discount(files[:2])
    cut_off = Path(f"{files[1]}{DISCOUNTED}")
    cut_off.write_bytes(cut_off.read_bytes()[:9])
    left = numbers(log)
    assert (len(left), log.count("stage"), log.of("stage")) == (2, 2, files[2:])
    assert len(numbers_of_all(log)) == 3
    assert log.tidy("stage") == 1
    assert cut_off.with_name(f"{cut_off.name}{BROKEN}").exists()
    assert (numbers(log), len(numbers_of_all(log))) == (left, 3)


def test_discounted_files_are_merged_among_themselves(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_log, "COMPACT_ABOVE", 2)
    log, files = ParquetLog(str(tmp_path)), small_files(tmp_path, 6)
    log.discount(files[:4])
    left = numbers(log)
    log.tidy("stage")
    for again in (log, ParquetLog(str(tmp_path))):
        assert (numbers(again), numbers_of_all(again)) == (left, [*range(6)])
    discounted = [*(tmp_path / "stage").glob(f"*{DISCOUNTED}")]
    assert len(discounted) == 1
    assert len(log.of("stage")) == 2
