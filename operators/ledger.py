"""The teacher ledger: every reply is stored raw before anyone parses it, and no call is ever made twice.

One Parquet row a call, under `<folder>/<stage>/`, keyed by a hash of everything that determines the reply
(`calls.call_key`). A call whose key is there is answered from there: after a crash, in the next scheduled run, or when
a later stage changes. Files appear whole or not at all, and are never rewritten. Failed calls are kept too: they are
made again until they have failed `teacher.max_attempts` times, so that one poisonous row cannot cost for ever.

Cost: two hash shuffles a stage, one of keys (which calls are new) and one of rows (to bring the replies back). Nothing
is collected on the driver.
"""

import datetime
import uuid
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from operators.calls import CALLS, REPLIES, call_key
from operators.progress import report_progress
from operators.stage import require_columns
from operators.teacher import TeacherConfig, generate, num_prompt_tokens

RECORD = pa.schema([*REPLIES, ("stage", pa.string()), ("model", pa.string()), ("created", pa.string())])
ROWS_PER_PARTITION = 50_000
REPLY_COLUMNS = tuple(name for name in REPLIES.names if name not in ("call_key", "row_id"))


class Ledger:
    """The store of all teacher calls of one project; `figures()` tells what this process asked and paid for."""

    def __init__(self, folder: str) -> None:
        """Open the ledger at an absolute path or a URI; it need not exist."""
        self._folder = folder
        self._figures: dict[str, float] = {}

    def figures(self) -> dict[str, float]:
        """Calls, cached_calls, failed_calls, prompt_tokens, generated_tokens of all `answer` calls so far."""
        return dict(self._figures)

    def answer(self, calls: Dataset, teacher: TeacherConfig, stage: str) -> Dataset:
        """Bring every call its reply; the teacher is asked only what the ledger does not hold.

        New calls are made and committed before this returns; the result itself is lazy.

        Columns in:
            row_id: str, unique; messages: JSON list of {"role", "content"}, null where nothing is asked;
            schema: JSON schema of the reply or ""; max_tokens: int32; any others pass through.
        Columns out:
            the same without messages, schema and max_tokens; reply: str, null if not asked or failed; finish_reason:
            "stop" | "length"; prompt_tokens, generated_tokens: int32; error: str, "" if answered.

        Raises:
            ray.exceptions.RayTaskError: from a ValueError that names the missing columns.
        """
        parts = teacher.key_parts()
        keyed = calls.map_batches(
            partial(_add_keys, stage=stage, teacher_parts=parts), batch_format="pyarrow", num_cpus=0.25
        )
        counts = keyed.map_batches(_counts, batch_format="pyarrow", num_cpus=0.25).sum(["rows", "asked"])
        num_rows, num_asked = int(counts["sum(rows)"] or 0), int(counts["sum(asked)"] or 0)
        asked = keyed.map_batches(_asked, batch_format="pyarrow", num_cpus=0.25)
        new = self._without_known(asked, stage, teacher.max_attempts, num_asked)
        num_new = num_asked if new is asked else new.count()
        report_progress(stage, total=num_new, note=f"{num_asked - num_new} from the ledger")
        made = self._make(new, teacher, stage) if num_new else {}
        self._add_figures(num_asked - num_new, num_new, made)
        return self._bring_replies(keyed, stage, num_rows)

    def count_calls(self, calls: Dataset, teacher: TeacherConfig, stage: str) -> dict[str, int]:
        """What `answer` would do, without doing it: calls asked, new, over_long (new and too long for the teacher).

        Also the new calls' prompt_tokens, and reply_tokens as predicted: new calls times the mean length of the replies
        that the ledger holds for this stage, or the limit where it holds none.
        """
        keyed = calls.map_batches(
            partial(_add_keys, stage=stage, teacher_parts=teacher.key_parts()), batch_format="pyarrow", num_cpus=0.25
        )
        asked = keyed.map_batches(_asked, batch_format="pyarrow", num_cpus=0.25)
        num_asked = asked.count()
        new = self._without_known(asked, stage, teacher.max_attempts, num_asked)
        sums = new.map_batches(partial(_measure_calls, teacher=teacher), batch_format="pyarrow", num_cpus=0.25).sum(
            ["new", "over_long", "prompt_tokens", "reply_limit"]
        )
        counts = {name.removeprefix("sum(").removesuffix(")"): int(value or 0) for name, value in sums.items()}
        limit, known = counts.pop("reply_limit"), self.read(stage, ["generated_tokens"])
        mean: Any = known.mean("generated_tokens") if known is not None else None
        return {
            "asked": num_asked,
            **counts,
            "reply_tokens": limit if mean is None else int(counts["new"] * float(mean)),
        }

    def _make(self, new: Dataset, teacher: TeacherConfig, stage: str) -> dict[str, Any]:
        commit = _Committer(f"{self._folder}/{stage}", stage, teacher.model)
        committed = generate(new, teacher).map_batches(commit, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
        sums: dict[str, Any] = committed.sum(["failed_calls", "prompt_tokens", "generated_tokens"])
        return {name.removeprefix("sum(").removesuffix(")"): int(value) for name, value in sums.items()}

    def _add_figures(self, num_cached: int, num_new: int, made: dict[str, Any]) -> None:
        added = {
            "calls": num_new,
            "cached_calls": num_cached,
            "failed_calls": 0,
            "prompt_tokens": 0,
            "generated_tokens": 0,
        }
        for name, value in (added | made).items():
            self._figures[name] = self._figures.get(name, 0) + value

    def _without_known(self, asked: Dataset, stage: str, max_attempts: int, num_rows: int) -> Dataset:
        known = self.read(stage, ["call_key", "error"])
        if known is None:
            return asked
        settled = _partition_by_key(known, num_rows).map_batches(
            partial(_settled_keys, max_attempts=max_attempts), batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )
        return asked.join(settled, "left_anti", _num_partitions(num_rows), on=("call_key",))

    def _bring_replies(self, keyed: Dataset, stage: str, num_rows: int) -> Dataset:
        schema = keyed.schema().base_schema
        known = self.read(stage, ["call_key", *REPLY_COLUMNS])
        rows = keyed.map_batches(partial(_tag_rows, schema=schema), batch_format="pyarrow", num_cpus=0.25)
        if known is None:
            both = rows
        else:
            both = rows.union(
                known.map_batches(partial(_tag_replies, schema=schema), batch_format="pyarrow", num_cpus=0.25)
            )
        return _partition_by_key(both, num_rows).map_batches(
            _merge, batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )

    def read(self, stage: str, columns: list[str]) -> Dataset | None:
        """All committed records of a stage, lazily; None if there are none. Unfinished files are not looked at."""
        filesystem, root = (
            fs.FileSystem.from_uri(f"{self._folder}/{stage}")
            if "://" in self._folder
            else (fs.LocalFileSystem(), f"{self._folder}/{stage}")
        )
        selector = fs.FileSelector(root, allow_not_found=True)
        files = [info.path for info in filesystem.get_file_info(selector) if info.path.endswith(".parquet")]
        if not files:
            return None
        return ray.data.read_parquet(sorted(files), filesystem=filesystem).select_columns(columns)


class _Committer:
    """Writes one file a batch of replies, and answers with one row of counts."""

    def __init__(self, folder: str, stage: str, model: str) -> None:
        self._folder, self._stage, self._model = folder, stage, model

    def __call__(self, replies: pa.Table) -> pa.Table:
        if replies.num_rows:
            write_whole(self._folder, self._records(replies))
            report_progress(self._stage, rows=replies.num_rows, tokens=pc.sum(replies["generated_tokens"]).as_py() or 0)
        failed = pc.sum(pc.not_equal(replies["error"], "")).as_py() or 0
        sums = [pc.sum(replies[name]).as_py() or 0 for name in ("prompt_tokens", "generated_tokens")]
        return pa.table({"failed_calls": [failed], "prompt_tokens": sums[:1], "generated_tokens": sums[1:]})

    def _records(self, replies: pa.Table) -> pa.Table:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        columns = [*replies.columns, *(pa.array([text] * replies.num_rows) for text in (self._stage, self._model, now))]
        return pa.Table.from_arrays(columns, schema=RECORD)


def write_whole(folder: str, table: pa.Table) -> None:
    """Write a Parquet file that appears whole or not at all, under a name that no other batch and no retry has."""
    name = uuid.uuid4().hex
    filesystem, root = fs.FileSystem.from_uri(folder)
    filesystem.create_dir(root)
    unfinished, finished = f"{root}/.{name}.unfinished", f"{root}/{name}.parquet"
    with filesystem.open_output_stream(unfinished) as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    filesystem.move(unfinished, finished)


def _num_partitions(num_rows: int) -> int:
    return max(1, num_rows // ROWS_PER_PARTITION)


def _partition_by_key(data: Dataset, num_rows: int) -> Dataset:
    """All rows of one key in one block."""
    return data.repartition(_num_partitions(num_rows), keys=["call_key"])


def _add_keys(calls: pa.Table, stage: str, teacher_parts: list[str | float | int]) -> pa.Table:
    require_columns(f"ledger {stage}", ["row_id", "messages", "schema", "max_tokens"], calls.column_names)
    keys = [
        call_key(call, stage, teacher_parts) if call["messages"] is not None else f"not asked {call['row_id']}"
        for call in calls.select(["row_id", "messages", "schema", "max_tokens"]).to_pylist()
    ]
    return calls.append_column("call_key", pa.array(keys, pa.string()))


def _counts(keyed: pa.Table) -> pa.Table:
    return pa.table({"rows": [keyed.num_rows], "asked": [keyed.num_rows - keyed["messages"].null_count]})


def _measure_calls(new: pa.Table, teacher: TeacherConfig) -> pa.Table:
    lengths = [num_prompt_tokens(messages, teacher) for messages in new["messages"].to_pylist()]
    limits = new["max_tokens"].to_pylist()
    over = sum(have + wanted > teacher.max_model_len for have, wanted in zip(lengths, limits, strict=True))
    sums = {"new": new.num_rows, "over_long": over, "prompt_tokens": sum(lengths), "reply_limit": sum(limits)}
    return pa.table({name: [value] for name, value in sums.items()})


def _asked(keyed: pa.Table) -> pa.Table:
    return keyed.filter(pc.is_valid(keyed["messages"])).select(CALLS.names).cast(CALLS)


def _settled_keys(known: pa.Table, max_attempts: int) -> pa.Table:
    """Keys that were answered, or have failed so often that they are not worth another try."""
    counts = known.append_column("answered", pc.equal(known["error"], "")).group_by("call_key")
    table = counts.aggregate([("answered", "any"), ("call_key", "count")])
    settled = pc.or_(table["answered_any"], pc.greater_equal(table["call_key_count"], max_attempts))
    return table.filter(settled).select(["call_key"])


def _tag_rows(keyed: pa.Table, schema: pa.Schema) -> pa.Table:
    rows = keyed.select(schema.names).cast(schema)
    for name in REPLY_COLUMNS:
        rows = rows.append_column(REPLIES.field(name), pa.nulls(rows.num_rows, REPLIES.field(name).type))
    return rows.append_column("is_reply", pa.array([False] * rows.num_rows))


def _tag_replies(known: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = {
        field.name: known["call_key"] if field.name == "call_key" else pa.nulls(known.num_rows, field.type)
        for field in schema
    }
    columns |= {name: known[name].cast(REPLIES.field(name).type) for name in REPLY_COLUMNS}
    return pa.table({**columns, "is_reply": pa.array([True] * known.num_rows)})


def _merge(both: pa.Table) -> pa.Table:
    """Within one partition: give every row its reply, an answer before a failure, and drop what nobody asked for."""
    replies = both.filter(both["is_reply"]).select(["call_key", *REPLY_COLUMNS])
    # "" sorts first: after this, the first record of a key is an answer if there is one.
    replies = replies.sort_by([("call_key", "ascending"), ("error", "ascending")])
    first = replies.group_by("call_key", use_threads=False).aggregate([(name, "first") for name in REPLY_COLUMNS])
    first = first.select(["call_key", *(f"{name}_first" for name in REPLY_COLUMNS)]).rename_columns(
        ["call_key", *REPLY_COLUMNS]
    )
    rows = both.filter(pc.invert(both["is_reply"])).drop_columns(["is_reply", "messages", "schema", "max_tokens"])
    joined = rows.drop_columns(list(REPLY_COLUMNS)).join(first, "call_key", join_type="left outer")
    return joined.drop_columns(["call_key"])
