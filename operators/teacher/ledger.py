"""The teacher ledger: every reply is stored raw before anyone parses it, and no call is ever made twice.

One Parquet row a call, under `<folder>/<stage>/`, keyed by a hash of everything that determines the reply
(`calls.call_key`). A call whose key is there is answered from there: after a crash, in the next scheduled run, or when
a later stage changes. Files appear whole or not at all, and one that lost its end is set aside; many small ones are
merged into large ones, and only then deleted. Failed calls are kept too: they are made again until they have failed
`teacher.max_attempts` times.

Cost: two shuffles a stage, one of the calls with the stored keys (which calls are new) and one of the rows with the
replies; where a stage holds more than is asked, what nobody asked for is left in its files. Nothing is collected on the
driver. How calls are made, and what may stop them, is in `ask`.
"""

import datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.columns import conform
from operators.join import add_up, group_by_key
from operators.parquet_log import ParquetLog, write_whole
from operators.progress import report_progress
from operators.stage import require_columns
from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.calls import CALLS, REPLIES, call_key
from operators.teacher.config import TeacherConfig, num_prompt_tokens
from operators.teacher.dispatch import Asking, TeacherStoppedError
from operators.teacher.supervisor import FATAL

RECORD = pa.schema([*REPLIES, ("stage", pa.string()), ("model", pa.string()), ("created", pa.string())])
ROWS_PER_PARTITION = 50_000
CALL_COLUMNS = ("messages", "schema", "max_tokens")
REPLY_COLUMNS = tuple(name for name in REPLIES.names if name not in ("call_key", "row_id"))
_CALLS_AND_RECORDS = CALLS.append(REPLIES.field("error"))  # null in calls


class Ledger:
    """The store of all teacher calls of one project; `metrics()` tells what this process asked and paid for."""

    def __init__(self, folder: str, budget: BudgetConfig | None = None, *, offline: bool = False) -> None:
        """Open the ledger at an absolute path or a URI; it need not exist.

        Args:
            folder: holds a folder a stage.
            budget: what all calls of the ledger together may cost; no limit if None.
            offline: make no call; a reply that is not there is an error.
        """
        self._folder, self._offline = folder, offline
        self.files = ParquetLog(folder)
        self._budget = budget or BudgetConfig()
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Calls, cached_calls, failed_calls, prompt_tokens, generated_tokens, cost of all `answer` calls so far."""
        if not self._metrics:
            return {}
        used = Tokens(int(self._metrics["prompt_tokens"]), int(self._metrics["generated_tokens"]))
        return self._metrics | {"cost": self._budget.cost(used)}

    def tokens(self, *stages: str) -> Tokens:
        """What these stages have paid for so far; all of them if none is named. Reads two columns on the driver."""
        spent, columns = Tokens(), ["prompt_tokens", "generated_tokens"]
        for stage in stages or self.files.stages():
            for batch in self.files.batches(stage, columns):
                spent += Tokens(*(pc.sum(batch[name]).as_py() or 0 for name in columns))
        return spent

    def answer(
        self,
        calls: Dataset,
        teacher: TeacherConfig,
        stage: str,
        *,
        first: int | None = None,
        optional: bool = False,
    ) -> Dataset:
        """Bring every call its reply; the teacher is asked only what the ledger does not hold.

        New calls are made and committed before this returns; the result itself is lazy.

        Args:
            calls: see below.
            teacher: who answers.
            stage: names the part of the ledger, and the stage in errors.
            first: make no more new calls than this; None makes all.
            optional: an offline ledger leaves these calls without a reply instead of refusing.

        Columns in:
            row_id: str, unique; messages: JSON list of {"role", "content"}, null where nothing is asked;
            schema: JSON schema of the reply or ""; max_tokens: int32; any others pass through.
        Columns out:
            the same without messages, schema and max_tokens; reply: str, null if not asked or failed; finish_reason:
            "stop" | "length"; prompt_tokens, generated_tokens: int32; error: str, "" if answered.

        Raises:
            ray.exceptions.RayTaskError: from a ValueError that names the missing columns.
            TeacherStoppedError: see `ask.Asking.run`; or the ledger is offline and lacks replies.
        """
        broken = self.files.tidy(stage)
        keyed, asked = _keyed(calls, teacher, stage)
        num_rows, num_asked, schema = _survey(calls, stage)
        if not num_asked:
            self._add_metrics(0, 0, {})
            return keyed.map_batches(_without_replies, batch_format="pyarrow", num_cpus=0.25)
        attempts = 1 if self._offline else teacher.max_attempts

        pending = self._without_known(asked, stage, attempts, num_asked)
        if first is not None or self.files.of(stage):
            # Before the engines start: beside them, the tasks of a shuffle may wait for a free CPU for ever.
            pending = (pending if first is None else pending.limit(first)).materialize()
            num_new = pending.count()
        else:
            num_new = num_asked
        cut_off = f", {broken} broken files set aside" if broken else ""
        report_progress(stage, total=num_new, note=f"{num_asked - num_new} from the ledger{cut_off}")
        made: dict[str, int] = {}
        if num_new and self._offline and not optional:
            raise TeacherStoppedError(
                f"{stage}: the ledger lacks {num_new} of {num_asked} replies, and --reparse makes no call; "
                "the prompt, the teacher or the rows have changed: run without it"
            )
        if num_new and not self._offline:
            commit = partial(_commit, folder=f"{self._folder}/{stage}", stage=stage, model=teacher.model)
            spent = self.tokens() if self._budget.is_limited() else Tokens()
            made = Asking(stage, teacher, self._budget, commit, pending, spent).run()
        self._add_metrics(num_asked - num_new, 0 if self._offline else num_new, made)
        return self._bring_replies(keyed, stage, num_rows, schema.append(CALLS.field("call_key")))

    def count_calls(self, calls: Dataset, teacher: TeacherConfig, stage: str) -> dict[str, int]:
        """What `answer` would do, without doing it: calls asked, new, over_long (new and too long for the teacher).

        Also the new calls' prompt_tokens, and reply_tokens as predicted from so many known_replies: new calls times the
        mean length of the replies that the ledger holds for this stage, or the limit where it holds none.
        """
        _, asked = _keyed(calls, teacher, stage)
        num_asked = asked.count()
        new = self._without_known(asked, stage, teacher.max_attempts, num_asked)
        measured = new.map_batches(partial(_measure_calls, teacher=teacher), batch_format="pyarrow", num_cpus=0.25)
        counts = add_up(measured, ["new", "over_long", "prompt_tokens", "reply_limit"])
        limit, known = counts.pop("reply_limit"), self.files.read(stage, ["generated_tokens"])
        mean: Any = known.mean("generated_tokens") if known is not None else 0
        num_known = self.files.count(stage)
        return {
            "asked": num_asked,
            **counts,
            "known_replies": num_known,
            "reply_tokens": int(counts["new"] * float(mean)) if num_known else limit,
        }

    def _add_metrics(self, num_cached: int, num_new: int, made: dict[str, Any]) -> None:
        added = {
            "calls": num_new,
            "cached_calls": num_cached,
            "failed_calls": 0,
            "prompt_tokens": 0,
            "generated_tokens": 0,
        }
        for name, value in (added | made).items():
            self._metrics[name] = self._metrics.get(name, 0) + value

    def _without_known(self, asked: Dataset, stage: str, max_attempts: int, num_rows: int) -> Dataset:
        if not self.files.of(stage):
            return asked
        keys = asked.select_columns(["call_key"])
        known, num_known = self.files.read_for(keys, num_rows, stage, ["call_key", "error"])
        as_record = partial(conform, schema=_CALLS_AND_RECORDS)
        both = asked.map_batches(as_record, batch_format="pyarrow", num_cpus=0.25).union(
            known.map_batches(as_record, batch_format="pyarrow", num_cpus=0.25)
        )
        return _partition_by_key(both, num_rows + num_known).map_batches(
            partial(_new_calls, max_attempts=max_attempts), batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )

    def _bring_replies(self, keyed: Dataset, stage: str, num_rows: int, schema: pa.Schema) -> Dataset:
        both = keyed.map_batches(partial(_tag_rows, schema=schema), batch_format="pyarrow", num_cpus=0.25)
        num_known = 0
        if self.files.of(stage):
            keys = keyed.select_columns(["call_key"])
            known, num_known = self.files.read_for(keys, num_rows, stage, ["call_key", *REPLY_COLUMNS])
            tag = partial(_tag_replies, schema=schema)
            both = both.union(known.map_batches(tag, batch_format="pyarrow", num_cpus=0.25))
        return _partition_by_key(both, num_rows + num_known).map_batches(
            _merge, batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )


def _commit(replies: pa.Table, folder: str, stage: str, model: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    columns = [*replies.columns, *(pa.array([text] * replies.num_rows) for text in (stage, model, now))]
    write_whole(folder, pa.Table.from_arrays(columns, schema=RECORD))
    report_progress(stage, rows=replies.num_rows, tokens=pc.sum(replies["generated_tokens"]).as_py() or 0)


def _partition_by_key(data: Dataset, num_rows: int) -> Dataset:
    """All rows of one key in one block."""
    return group_by_key(data, "call_key", 1 + num_rows // ROWS_PER_PARTITION)


def _keyed(calls: Dataset, teacher: TeacherConfig, stage: str) -> tuple[Dataset, Dataset]:
    """The calls with their keys; and only those that ask something, in the columns of CALLS."""
    add_keys = partial(_add_keys, stage=stage, teacher_parts=teacher.key_parts())
    keyed = calls.map_batches(add_keys, batch_format="pyarrow", num_cpus=0.25)
    return keyed, keyed.map_batches(_asked, batch_format="pyarrow", num_cpus=0.25)


def _add_keys(calls: pa.Table, stage: str, teacher_parts: list[str | float | int]) -> pa.Table:
    keys = [
        call_key(call, stage, teacher_parts) if call["messages"] is not None else f"not asked {call['row_id']}"
        for call in calls.select(["row_id", *CALL_COLUMNS]).to_pylist()
    ]
    return calls.append_column("call_key", pa.array(keys, pa.string()))


def _survey(calls: Dataset, stage: str) -> tuple[int, int, pa.Schema]:
    """How many rows there are, how many of them ask something, and their columns, in one pass.

    To ask Ray Data for the columns computes the whole first block a second time.
    """
    num_rows, num_asked, schema = 0, 0, CALLS
    counted = calls.map_batches(partial(_count, stage=stage), batch_format="pyarrow", num_cpus=0.25)
    for batch in counted.iter_batches(batch_size=None, batch_format="pyarrow"):
        table: pa.Table = batch
        for part in table.to_pylist():
            num_rows, num_asked = num_rows + part["rows"], num_asked + part["asked"]
            schema = pa.ipc.read_schema(pa.py_buffer(part["schema"]))
    return num_rows, num_asked, schema


def _count(calls: pa.Table, stage: str) -> pa.Table:
    require_columns(f"ledger {stage}", ["row_id", *CALL_COLUMNS], calls.column_names)
    asked = calls.num_rows - calls["messages"].null_count
    return pa.table({"rows": [calls.num_rows], "asked": [asked], "schema": [calls.schema.serialize().to_pybytes()]})


def _measure_calls(new: pa.Table, teacher: TeacherConfig) -> pa.Table:
    lengths = [num_prompt_tokens(messages, teacher) for messages in new["messages"].to_pylist()]
    limits = new["max_tokens"].to_pylist()
    over = sum(have + wanted > teacher.max_model_len for have, wanted in zip(lengths, limits, strict=True))
    sums = {"new": new.num_rows, "over_long": over, "prompt_tokens": sum(lengths), "reply_limit": sum(limits)}
    return pa.table({name: [value] for name, value in sums.items()})


def _asked(keyed: pa.Table) -> pa.Table:
    return keyed.filter(pc.is_valid(keyed["messages"])).select(CALLS.names).cast(CALLS)


def _new_calls(both: pa.Table, max_attempts: int) -> pa.Table:
    """Within one partition: the calls whose key no record settles."""
    if not both.num_rows:  # the shuffle may give a block no columns at all
        return CALLS.empty_table()
    is_record = pc.is_valid(both["error"])
    settled = _settled_keys(both.filter(is_record).select(["call_key", "error"]), max_attempts)
    calls = both.filter(pc.invert(is_record)).drop_columns(["error"])
    return calls.filter(pc.invert(pc.is_in(calls["call_key"], settled["call_key"].combine_chunks())))


def _settled_keys(known: pa.Table, max_attempts: int) -> pa.Table:
    """Keys that were answered, have failed so often that they are not worth another try, or kill the engine."""
    known = known.append_column("answered", pc.equal(known["error"], ""))
    known = known.append_column("fatal", pc.match_substring(known["error"], FATAL))
    table = known.group_by("call_key").aggregate([("answered", "any"), ("fatal", "any"), ("call_key", "count")])
    settled = pc.or_(table["answered_any"], pc.greater_equal(table["call_key_count"], max_attempts))
    settled = pc.or_(settled, table["fatal_any"])
    return table.filter(settled).select(["call_key"])


def _tag_rows(keyed: pa.Table, schema: pa.Schema) -> pa.Table:
    rows = keyed.select(schema.names).cast(schema)
    for name in REPLY_COLUMNS:
        rows = rows.append_column(REPLIES.field(name), pa.nulls(rows.num_rows, REPLIES.field(name).type))
    return rows.append_column("is_reply", pa.array([False] * rows.num_rows))


def _without_replies(keyed: pa.Table) -> pa.Table:
    rows = keyed.drop_columns(["call_key", *CALL_COLUMNS])
    for name in REPLY_COLUMNS:
        rows = rows.append_column(REPLIES.field(name), pa.nulls(rows.num_rows, REPLIES.field(name).type))
    return rows


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
    rows = both.filter(pc.invert(both["is_reply"])).drop_columns(["is_reply", *CALL_COLUMNS])
    joined = rows.drop_columns(list(REPLY_COLUMNS)).join(first, "call_key", join_type="left outer")
    return joined.drop_columns(["call_key"])
