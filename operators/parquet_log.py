"""A log of records in Parquet files. A file appears whole or not at all; small files are merged into large ones."""

import hashlib
import json
import time
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from operators.files.atomic import UNFINISHED, open_filesystem, put_file
from operators.files.damage import DamagedFileError, naming_damage

COMPACT_ABOVE, FILES_MERGED = 128, 256  # small files of a stage, and those that become one
LARGE_BYTES = 128 << 20  # a file of this size is not merged again: a terabyte has some thousands
READ_BYTES, READ_FILES = 32 << 20, 128  # most that one task reads
BATCH_ROWS = 32_768  # rows of a large file that a reader holds at a time
UNFINISHED_S = 24 * 3600  # age at which a hidden file is taken to be left by a dead writer
ENDING = ".parquet"
BROKEN = ".broken"  # ends the name of a file that was set aside
DISCOUNTED = ".discounted"  # ends the name of a file whose records do not count; only what they cost does
MERGED = b"merged_files"  # in the footer of a merged file: names of the files whose records it holds, a JSON list
MOST_WANTED = 100_000  # with at most this many keys, records are filtered by key while they are read
READERS = 16  # threads that read footers


class ParquetLog:
    """A folder with one folder per stage; a path or a URI, which need not exist."""

    def __init__(self, folder: str) -> None:
        self._filesystem, self._root = open_filesystem(folder)
        self._folder = folder
        self._num_rows: dict[str, int] = {}  # of the files whose footers were read
        self._merged: dict[str, frozenset[str]] = {}  # merged file -> names of the files that it replaces

    def of(self, stage: str) -> list[str]:
        """Paths of the finished files of a stage within the ledger's file system, sorted."""
        return [info.path for info in self._whole(stage)]

    def cut_off(self, stage: str) -> list[str]:
        """Names of the files that lost their end. No reader counts them; the next `tidy` sets them aside."""
        found = self._found(stage)
        broken = self._read_footers([info.path for info in found])
        return [info.base_name for info in found if info.path in broken]

    def read(self, stage: str, columns: list[str]) -> Dataset | None:
        """All committed records of a stage, lazily; None if there are none. Files that are cut off are left out."""
        found = self._whole(stage)
        return self._records(found, columns, None) if found else None

    def read_for(self, asked: Dataset, num_asked: int, stage: str, columns: list[str]) -> tuple[Dataset, int]:
        """The records that have a key of `asked`, or all records if `asked` is large; and about how many these are.

        Args:
            asked: a data set of one column, which is among `columns`.
            num_asked: how many rows it has.
            stage: whose records are read.
            columns: to read.
        """
        found, num_stored = self._whole(stage), self.count(stage)
        if num_asked > MOST_WANTED or num_asked >= num_stored:
            return self._records(found, columns, None), num_stored
        return self._records(found, columns, ray.put(_only_block(asked, columns))), num_asked

    def count(self, stage: str) -> int:
        """How many records a stage has, by the footers of its files; each is read once."""
        return sum(self._num_rows[info.path] for info in self._whole(stage))

    def stages(self) -> list[str]:
        """Names of all stages that have a folder."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return [folder.base_name for folder in found if folder.type == fs.FileType.Directory]

    def batches(self, stage: str, columns: list[str], *, discounted: bool = False) -> Iterator[pa.RecordBatch]:
        """All committed records of a stage, batch by batch, read by the caller's own process.

        Args:
            stage: whose records are read.
            columns: to read.
            discounted: read the records of discounted files too.
        """
        for info in self._whole(stage, *((DISCOUNTED,) if discounted else ())):
            with self._filesystem.open_input_file(info.path) as stream, naming_damage(info.path, _cure(info.path)):
                yield from pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(columns=columns)

    def tidy(self, stage: str) -> int:
        """Set aside files that are cut off, and merge small files into large ones; call it before reading.

        A file gets its name when it is complete, but a machine that loses power may keep the name and lose the content.
        An interrupted merge may leave files whose records are in the merged one too; this deletes them, and what killed
        writers left unfinished more than a day ago.

        Returns:
            The number of files set aside: renamed, never deleted; the calls that they held are made again.
        """
        self._delete_unfinished(stage)
        found = self._found(stage, DISCOUNTED)
        broken = self._read_footers([info.path for info in found])
        for file in broken:
            self._filesystem.move(file, f"{file}{BROKEN}")
        whole = [info for info in found if info.path not in broken]
        counted = self._counted(whole)
        for info in whole:
            if info not in counted:
                self._filesystem.delete_file(info.path)
        for ending in (ENDING, f"{ENDING}{DISCOUNTED}"):
            small = [info for info in counted if info.size < LARGE_BYTES and info.path.endswith(ending)]
            if len(small) > COMPACT_ABOVE:
                merge: Any = ray.remote(num_cpus=0.25)(_merge_files)
                groups = _groups(small, LARGE_BYTES, FILES_MERGED)
                folder = f"{self._folder}/{stage}"
                ray.get([merge.remote(folder, group, ending) for group in groups if len(group) > 1])
        return len(broken)

    def _delete_unfinished(self, stage: str) -> None:
        """Delete hidden files that killed writers left; young ones are kept, as a task may still be writing them."""
        selector = fs.FileSelector(f"{self._root}/{stage}", allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            age = time.time() - info.mtime_ns / 1e9 if info.mtime_ns else 0
            if info.base_name.endswith(UNFINISHED) and age > UNFINISHED_S:
                self._filesystem.delete_file(info.path)

    def discount(self, files: Collection[str]) -> None:
        """Rename these files of `write_whole`, so that their records no longer count.

        `batches` can still read them, because what these calls cost is spent.
        """
        for file in files:
            self._filesystem.move(file, f"{file}{DISCOUNTED}")

    def _records(self, found: list[fs.FileInfo], columns: list[str], wanted: ray.ObjectRef[pa.Table] | None) -> Dataset:
        # Not `ray.data.read_parquet`: it lists and reads small files in 200 tasks of a tenth of a second each.
        tasks = ray.data.from_arrow([pa.table({"file": group}) for group in _groups(found, READ_BYTES, READ_FILES)])
        read = partial(_read, filesystem=self._filesystem, columns=columns, wanted=wanted)
        return tasks.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=0.25)

    def _found(self, stage: str, *others: str) -> list[fs.FileInfo]:
        """The finished files of a stage, and those that have one of these further endings, sorted."""
        selector = fs.FileSelector(f"{self._root}/{stage}", allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        endings = tuple(f"{ENDING}{other}" for other in ("", *others))
        finished = (info for info in found if info.path.endswith(endings) and info.base_name[0] != ".")
        return sorted(finished, key=lambda info: info.path)

    def _whole(self, stage: str, *others: str) -> list[fs.FileInfo]:
        """The files whose records count: a reader may come before `tidy` has removed the others."""
        found = self._found(stage, *others)
        broken = self._read_footers([info.path for info in found])
        return self._counted([info for info in found if info.path not in broken])

    def _counted(self, whole: list[fs.FileInfo]) -> list[fs.FileInfo]:
        """`whole` without the files whose records are also in a merged file."""
        merged = frozenset[str]().union(*(self._merged.get(info.path, frozenset()) for info in whole))
        return [info for info in whole if info.base_name not in merged]

    def _read_footers(self, files: list[str]) -> set[str]:
        """Store the number of rows of these files; returns those that lack their footer, which is written last.

        A file that cannot be read for another reason is not returned: whoever reads its records reports the error.
        """
        unknown = [file for file in files if file not in self._num_rows]
        with ThreadPoolExecutor(READERS) as threads:
            footers = dict(zip(unknown, threads.map(self._footer, unknown), strict=True))
        for file, footer in footers.items():
            if footer is not None:
                self._num_rows[file] = footer.num_rows
                self._merged[file] = frozenset(json.loads((footer.metadata or {}).get(MERGED, b"[]")))
        return {file for file, footer in footers.items() if footer is None}

    def _footer(self, file: str) -> pq.FileMetaData | None:
        try:
            with naming_damage(file, _cure(file)):
                return pq.read_metadata(file, filesystem=self._filesystem)
        except DamagedFileError:
            return None


def write_whole(folder: str, table: pa.Table, name: str = "", ending: str = ENDING) -> str:
    """Write a Parquet file that appears whole or not at all.

    Args:
        folder: a path or URI; need not exist.
        table: its content.
        name: of the file, without its ending: a writer that retries under the same name stores the table once. By
            default a unique name.
        ending: of the file's name.

    Returns:
        The file's path within the file system of the folder.
    """
    name = f"{name or uuid.uuid4().hex}{ending}"
    put_file(f"{folder}/{name}", partial(pq.write_table, table, compression="zstd", write_page_checksum=True))
    return f"{open_filesystem(folder)[1]}/{name}"


def _groups(found: list[fs.FileInfo], most_bytes: int, most_files: int) -> Iterator[list[str]]:
    """Paths in groups of at most `most_bytes` and `most_files`, but at least one file each."""
    group: list[str] = []
    size = 0
    for info in found:
        if group and (size + info.size > most_bytes or len(group) == most_files):
            yield group
            group, size = [], 0
        group.append(info.path)
        size += info.size
    yield group


def _read(
    files: pa.Table, filesystem: fs.FileSystem, columns: list[str], wanted: ray.ObjectRef[pa.Table] | None
) -> Iterator[pa.Table]:
    """The records of these files; with `wanted`, a table of one column, only records with one of its keys."""
    keys = None
    if wanted is not None:
        table: pa.Table = ray.get(wanted)
        [name] = table.column_names
        keys = table[name].combine_chunks()
    for path in files["file"].to_pylist():
        with filesystem.open_input_file(path) as stream, naming_damage(path, _cure(path)):
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                records = pa.Table.from_batches([batch]).replace_schema_metadata(None)  # merged files have MERGED there
                yield records if keys is None else records.filter(pc.is_in(records[name], keys))


def _only_block(asked: Dataset, columns: list[str]) -> pa.Table:
    """The rows of a data set of one column; the blocks of an empty one have no columns at all."""
    blocks = [block for block in ray.get(asked.to_arrow_refs()) if block.num_rows]
    return pa.concat_tables(blocks) if blocks else pa.table({columns[0]: pa.array([], pa.string())})


def _merge_files(folder: str, files: list[str], ending: str = ENDING) -> None:
    """Write the records of these files into one file with this ending that names them, then delete them.

    If this is interrupted in between, no record counts twice: readers leave out files that a merged one names. A second
    attempt writes the same merged file, because its name is made from theirs.
    """
    filesystem, root = open_filesystem(folder)
    names = sorted(file.rpartition("/")[2] for file in files)
    merged = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    if filesystem.get_file_info(f"{root}/{merged}{ending}").type != fs.FileType.File:
        tables = [_whole_table(filesystem, file) for file in files]
        table = pa.concat_tables(tables, promote_options="default")
        write_whole(folder, table.replace_schema_metadata({MERGED: json.dumps(names)}), merged, ending)
    for info in filesystem.get_file_info(files):
        if info.type == fs.FileType.File:
            filesystem.delete_file(info.path)


def _whole_table(filesystem: fs.FileSystem, path: str) -> pa.Table:
    with naming_damage(path, _cure(path)):
        return pq.read_table(path, filesystem=filesystem, partitioning=None, page_checksum_verification=True)


def _cure(path: str) -> str:
    return f"rename it to {path.rpartition('/')[2]}{BROKEN} and run again: calls that only it held are made again"
