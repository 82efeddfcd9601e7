"""A log of Parquet files before and after what was cut off has been set aside, without Ray."""

from pathlib import Path

import pyarrow as pa

from operators.parquet_log import BROKEN, ParquetLog, write_whole


def test_a_file_that_is_cut_off_is_left_out_by_every_reader_and_then_set_aside(tmp_path: Path) -> None:
    whole, cut_off = (Path(write_whole(f"{tmp_path}/stage", pa.table({"n": [n, n]}))) for n in (1, 2))
    cut_off.write_bytes(cut_off.read_bytes()[:-8])
    log = ParquetLog(str(tmp_path))
    assert log.of("stage") == [str(whole)]
    assert log.count("stage") == 2
    assert [batch["n"].to_pylist() for batch in log.batches("stage", ["n"])] == [[1, 1]]
    assert log.tidy("stage") == 1
    assert {file.name for file in (tmp_path / "stage").iterdir()} == {whole.name, f"{cut_off.name}{BROKEN}"}
