"""The ledger's joins within one partition: pure functions of Arrow tables."""

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from operators.teacher.calls import CALLS, REPLIES
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import FATAL, OVER_LONG
from operators.teacher.prompt_tokens import num_prompt_tokens

CALL_COLUMNS = ("messages", "schema", "max_tokens")
REPLY_COLUMNS = tuple(name for name in REPLIES.names if name not in ("call_key", "row_id"))
KNOWN = pa.schema([REPLIES.field("call_key"), REPLIES.field("error")])
KEYED_REPLIES = pa.schema([REPLIES.field("call_key"), *(REPLIES.field(name) for name in REPLY_COLUMNS)])


def measure_calls(new: pa.Table, teacher: TeacherConfig) -> pa.Table:
    """One row of sums over new calls: their number, those too long for the teacher, tokens of prompt and reply."""
    lengths = [num_prompt_tokens(messages, teacher) for messages in new["messages"].to_pylist()]
    limits = new["max_tokens"].to_pylist()
    over = sum(have + wanted > teacher.max_model_len for have, wanted in zip(lengths, limits, strict=True))
    sums = {"new": new.num_rows, "over_long": over, "prompt_tokens": sum(lengths), "reply_limit": sum(limits)}
    return pa.table({name: [value] for name, value in sums.items()})


def asked_calls(keyed: pa.Table) -> pa.Table:
    """The rows that ask something, in the columns of CALLS."""
    return keyed.filter(pc.is_valid(keyed["messages"])).select(CALLS.names).cast(CALLS)


def new_calls(calls: pa.Table, records: pa.Table, max_attempts: int, max_model_lens: Collection[int] = ()) -> pa.Table:
    """Within one partition: the calls whose key no record settles.

    Args:
        calls: columns of CALLS.
        records: columns of KNOWN.
        max_attempts: failures after which a call is not made again.
        max_model_lens: of the teachers; a prompt that was over another limit is tried again.
    """
    settled = _settled_keys(records.filter(pc.invert(_over_another_limit(records, max_model_lens))), max_attempts)
    return calls.filter(pc.invert(pc.is_in(calls["call_key"], settled["call_key"].combine_chunks())))


def _over_another_limit(records: pa.Table, max_model_lens: Collection[int]) -> pa.ChunkedArray:
    over = pc.starts_with(records["error"], OVER_LONG)
    for limit in max_model_lens:
        over = pc.and_not(over, pc.starts_with(records["error"], f"{OVER_LONG}{limit};"))
    return over


def _settled_keys(known: pa.Table, max_attempts: int) -> pa.Table:
    """Keys that were answered, have failed so often that they are not worth another try, or kill the engine."""
    known = known.append_column("answered", pc.equal(known["error"], ""))
    known = known.append_column("fatal", pc.starts_with(known["error"], FATAL))
    table = known.group_by("call_key").aggregate([("answered", "any"), ("fatal", "any"), ("call_key", "count")])
    settled = pc.or_(table["answered_any"], pc.greater_equal(table["call_key_count"], max_attempts))
    settled = pc.or_(settled, table["fatal_any"])
    return table.filter(settled).select(["call_key"])


def without_replies(keyed: pa.Table) -> pa.Table:
    """Rows of which none asked anything, with the columns of a reply."""
    rows = keyed.drop_columns(["call_key", *CALL_COLUMNS])
    for name in REPLY_COLUMNS:
        rows = rows.append_column(REPLIES.field(name), pa.nulls(rows.num_rows, REPLIES.field(name).type))
    return rows


def merge(rows: pa.Table, replies: pa.Table) -> pa.Table:
    """Within one partition: give every row its reply, an answer before a failure, and drop what nobody asked for.

    Args:
        rows: call_key, columns of CALL_COLUMNS, and any others.
        replies: columns of KEYED_REPLIES.
    """
    # "" sorts first: after this, the first record of a key is an answer if there is one.
    replies = replies.sort_by([("call_key", "ascending"), ("error", "ascending")])
    first = replies.group_by("call_key", use_threads=False).aggregate([(name, "first") for name in REPLY_COLUMNS])
    first = first.select(["call_key", *(f"{name}_first" for name in REPLY_COLUMNS)]).rename_columns(
        ["call_key", *REPLY_COLUMNS]
    )
    joined = rows.drop_columns(list(CALL_COLUMNS)).join(first, "call_key", join_type="left outer")
    return joined.drop_columns(["call_key"])
