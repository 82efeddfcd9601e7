"""The ledger's files: Parquet that appears whole or not at all, many small ones merged into few large ones."""

import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from operators.budget import Tokens

COMPACT_ABOVE, FILES_MERGED = 1024, 256


class LedgerFiles:
    """A folder that holds a folder a stage; a path or a URI, which need not exist."""

    def __init__(self, folder: str) -> None:
        self._filesystem, self._root = fs.FileSystem.from_uri(folder)
        self._folder = folder

    def of(self, stage: str) -> list[str]:
        """Paths of the finished files of a stage within the ledger's file system, sorted."""
        selector = fs.FileSelector(f"{self._root}/{stage}", allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        return sorted(info.path for info in found if info.path.endswith(".parquet") and info.base_name[0] != ".")

    def read(self, stage: str, columns: list[str]) -> Dataset | None:
        """All committed records of a stage, lazily; None if there are none. Unfinished files are not looked at."""
        files = self.of(stage)
        if not files:
            return None
        return ray.data.read_parquet(files, filesystem=self._filesystem).select_columns(columns)

    def tokens(self) -> Tokens:
        """What all stages have paid for so far."""
        spent, columns = Tokens(), ["prompt_tokens", "generated_tokens"]
        for folder in self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True)):
            records = self.read(folder.base_name, columns)
            if records is not None:
                sums: Any = records.sum(columns)
                spent += Tokens(*(int(sums[f"sum({name})"] or 0) for name in columns))
        return spent

    def compact(self, stage: str) -> None:
        """Merge the files of a stage, many small into few large, where there are more than a reader likes."""
        files = self.of(stage)
        if len(files) <= COMPACT_ABOVE:
            return
        merge: Any = ray.remote(num_cpus=0.25)(_merge_files)
        groups = [files[start : start + FILES_MERGED] for start in range(0, len(files), FILES_MERGED)]
        ray.get([merge.remote(f"{self._folder}/{stage}", group) for group in groups])


def write_whole(folder: str, table: pa.Table) -> None:
    """Write a Parquet file that appears whole or not at all, under a name that no other batch and no retry has."""
    name = uuid.uuid4().hex
    filesystem, root = fs.FileSystem.from_uri(folder)
    filesystem.create_dir(root)
    unfinished, finished = f"{root}/.{name}.unfinished", f"{root}/{name}.parquet"
    with filesystem.open_output_stream(unfinished) as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    filesystem.move(unfinished, finished)


def _merge_files(folder: str, files: list[str]) -> None:
    """Write the records of these files into one, then delete them; cut off in between, some records lie there twice."""
    filesystem, _ = fs.FileSystem.from_uri(folder)
    write_whole(folder, pa.concat_tables(pq.read_table(file, filesystem=filesystem) for file in files))
    for file in files:
        filesystem.delete_file(file)
