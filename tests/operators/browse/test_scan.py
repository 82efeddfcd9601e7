from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from operators.browse.scan import Cursor, Page, Wanted, read_page

LOCAL = fs.LocalFileSystem()
NUM_ROWS = 100


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """100 rows in three files of several row groups; every tenth row is quarantined, every 25th says Needle."""
    rows = [
        {
            "row_id": f"r{number:03}",
            "outcome": f"quarantined:{'ab'[number // 10 % 2]}" if number % 10 == 0 else "original",
            "text": f"a NEEDLE in {number}" if number % 25 == 24 else f"hay {number}",
            "note": None,
        }
        for number in range(NUM_ROWS)
    ]
    schema = pa.schema([(name, pa.string()) for name in ("row_id", "outcome", "text", "note")])
    paths = []
    for name, start, stop in (("a", 0, 30), ("b", 30, 30), ("c", 30, 100)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start:stop], schema=schema), path, row_group_size=16)
        paths.append(str(path))
    return paths


def page_of(files: list[str], wanted: Wanted, start: Cursor = Cursor(), limit: int = 7, **more: Any) -> Page:  # noqa: B008
    return read_page(LOCAL, files, ["row_id", "outcome", "gone"], wanted, start, limit, **more)


def all_ids(files: list[str], wanted: Wanted, limit: int, **more: Any) -> list[str]:
    ids: list[str] = []
    cursor: Cursor | None = Cursor()
    while cursor is not None:
        page = page_of(files, wanted, Cursor.parse(str(cursor)), limit, **more)
        assert len(page.rows) <= limit
        ids += [row["row_id"] for row in page.rows]
        cursor = page.following
    return ids


@pytest.mark.parametrize("limit", [1, 7, 16, 30, 100, 1000])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), range(NUM_ROWS)),
        (Wanted({"outcome": "original"}), [n for n in range(NUM_ROWS) if n % 10]),
        (Wanted({"outcome": "quarantined:a"}), range(0, NUM_ROWS, 20)),
        (Wanted({"outcome": "quarantined:"}), range(0, NUM_ROWS, 10)),
        (Wanted({"row_id": frozenset({"r003", "r099", "none"})}), [3, 99]),
        (Wanted({}, (), "needle", ["text"]), [24, 49, 74, 99]),
        (Wanted({"outcome": "quarantined:"}, (), "hay 5", ["note", "text"]), [50]),
        (Wanted({}, (), "a.*b", ["text"]), []),
        (Wanted({}, (), "needle", ["text"], ("ANTINE", ["outcome"])), []),
        (Wanted({}, (), "hay", ["text"], ("ANTINED:b", ["note", "outcome"])), range(10, NUM_ROWS, 20)),
        (Wanted(also=("antined:b", ["outcome"])), range(10, NUM_ROWS, 20)),
        (Wanted({}, ["text"]), range(NUM_ROWS)),
        (Wanted({}, ["note"]), []),
        (Wanted({"missing": "x"}), []),
        (Wanted({}, (), "hay", ["missing"]), []),
    ],
)
def test_the_pages_together_hold_every_wanted_row_once(
    files: list[str], wanted: Wanted, expected: Any, limit: int
) -> None:
    assert all_ids(files, wanted, limit) == [f"r{number:03}" for number in expected]


def test_a_page_shows_the_columns_that_are_there(files: list[str]) -> None:
    page = page_of(files, Wanted(), limit=1)
    assert page.rows == [{"row_id": "r000", "outcome": "quarantined:a"}]
    assert (page.looked_at, page.out_of_time) == (1, False)


def test_a_search_whose_time_is_over_goes_on_where_it_stopped(files: list[str]) -> None:
    first = page_of(files, Wanted({}, (), "needle", ["text"]), seconds=0)
    assert first.out_of_time
    assert first.following is not None
    assert all_ids(files, Wanted({}, (), "needle", ["text"]), 7, seconds=0) == ["r024", "r049", "r074", "r099"]


def test_new_files_between_two_pages_repeat_no_row(files: list[str], tmp_path: Path) -> None:
    page = page_of(files, Wanted(), limit=40)
    assert page.following is not None
    table = pq.read_table(files[0]).slice(0, 2)
    pq.write_table(table, tmp_path / "0.parquet")
    now = sorted([str(tmp_path / "0.parquet"), *files])
    rest = page_of(now, Wanted(), page.following, limit=1000)
    assert [row["row_id"] for row in rest.rows] == [f"r{number:03}" for number in range(40, NUM_ROWS)]


@pytest.mark.parametrize("text", ["", "x", "7", "-a", "-1-a.parquet", "1²-a", "a-7"])
def test_an_invalid_cursor_means_the_beginning(text: str) -> None:
    assert Cursor.parse(text) == Cursor()


def test_a_cursor_survives_being_written_and_read() -> None:
    assert Cursor.parse(str(Cursor("part-0-1.parquet", 7))) == Cursor("part-0-1.parquet", 7)
