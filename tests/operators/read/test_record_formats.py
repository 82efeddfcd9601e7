"""Every format gives the same records, however a file is cut, and one bad file is one bad record."""

from pathlib import Path

import pytest

from operators.read.record_formats import read_records
from operators.read.source_files import Piece
from tests.operators.read.source_samples import WRITERS, alpaca_like, records_of


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("range_bytes", [7, 100, 10_000])
def test_every_record_belongs_to_exactly_one_range(tmp_path: Path, name: str, range_bytes: int) -> None:
    records = alpaca_like(40)
    found = records_of(WRITERS[name](tmp_path / name, records), range_bytes)
    assert [record.value for record in found] == records
    assert len({record.position for record in found}) == len(records)
    assert not any(record.reason or record.unread for record in found)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_file_that_is_not_what_its_name_says_raises_nothing(tmp_path: Path, name: str) -> None:
    for content in (b"\x00\xff garbage \x93" * 40, b"\x1f\x8b", b"PAR1", b"\n\n", b"{", b'"', b"[[[", b"\xff\xfe"):
        path = tmp_path / name
        path.write_bytes(content)
        assert all(record.reason for record in records_of(path) if not isinstance(record.value, dict))


@pytest.mark.parametrize("piece", [(0, 100), (100, 200), (0, 0)])
def test_a_file_that_went_away_is_an_error_and_not_bad_data(tmp_path: Path, piece: tuple[int, int]) -> None:
    """Bad data counts as read, so the file would not be read again when it is back."""
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        list(read_records(Piece(0, str(tmp_path / "gone.jsonl"), *piece)))
