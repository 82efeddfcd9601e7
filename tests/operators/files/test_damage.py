"""A flipped bit anywhere in a file is found when it is read, and the error has the file's name and the cure."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.files.damage import DamagedFileError, naming_damage
from operators.parquet_log import ParquetLog, write_whole

TABLE = pa.table({"call_key": [f"k{n}" for n in range(500)], "reply": [f"reply number {n}" for n in range(500)]})


def test_no_flipped_bit_of_a_ledger_file_reads_back_wrong(tmp_path: Path) -> None:
    """Without page checksums one flipped bit in twelve was read back as another reply."""
    path = Path(write_whole(f"{tmp_path}/stage", TABLE))
    whole = path.read_bytes()
    wrong = found = 0
    for place in range(4, len(whole) - 8, max(1, len(whole) // 120)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        log = ParquetLog(str(tmp_path))
        if log.cut_off("stage"):  # its footer is damaged: set aside as a whole, and counted
            found += 1
            continue
        try:
            read = pa.Table.from_batches(log.batches("stage", TABLE.column_names))
            wrong += not read.equals(TABLE)
        except DamagedFileError as error:
            found += str(path) in str(error) and f"{path.name}.broken" in str(error)
        except (ValueError, pa.ArrowException):
            wrong += 1
    assert (wrong, found > 50) == (0, True)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), OSError("AWS Error NETWORK_CONNECTION during GetObject")]
)
def test_errors_other_than_damage_are_passed_on(error: OSError) -> None:
    with pytest.raises(type(error)), naming_damage("x", "y"):
        raise error


def test_a_read_that_fails_names_file_and_cure(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\x00" * 90 + b"PAR1")
    with (
        pytest.raises(DamagedFileError, match=r"a\.parquet is damaged .*; restore it$"),
        naming_damage(str(tmp_path / "a.parquet"), "restore it"),
    ):
        pq.read_table(tmp_path / "a.parquet")
