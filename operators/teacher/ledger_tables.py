"""The ledger's joins within one partition: pure functions of Arrow tables."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from operators.teacher.calls import CALLS, REPLIES
from operators.teacher.failures import CUT_TEXTLESS, FATAL, OVER_CONTEXT, OVER_LONG
from operators.teacher.prompt_tokens import num_prompt_tokens
from operators.teacher.variants import Member, member_of_row

CALL_COLUMNS = ("messages", "schema", "max_tokens")
KEY_COLUMNS = ("call_key", "base_key")
REPLY_COLUMNS = tuple(name for name in REPLIES.names if name not in (*KEY_COLUMNS, "row_id"))
CONTEXT = pa.field("max_model_len", pa.int32())  # of the teacher, when the call was made; null in older records
# Beginnings of the error of a prompt that the endpoint's context has no room for; the last two are of older ledgers.
_OVER_CONTEXT = (OVER_CONTEXT, f"{FATAL}BadRequestError: ", f"{FATAL}APIStatusError: ")
_SETTLING = ("row_id", *KEY_COLUMNS, "error", "finish_reason", "prompt_tokens", "generated_tokens")
KNOWN = pa.schema([*(REPLIES.field(name) for name in _SETTLING), CONTEXT])  # columns that tell if a call is settled
# `row_id` is the key of the joins, so that the records of a row under all length limits come together.
KEYED_REPLIES = pa.schema([*(REPLIES.field(name) for name in ("row_id", *KEY_COLUMNS, *REPLY_COLUMNS)), CONTEXT])


@dataclass(frozen=True)
class Tries:
    """Decides when a call is made again although the ledger has records of it.

    Attributes:
        max_attempts: number of failures after which a call is not made again.
        max_model_lens: of the teachers of the stage.
        weights: of the teachers; they decide who answers a row.
        lengthen: whether replies that a smaller max_model_len cut off are asked for again.
    """

    max_attempts: int
    max_model_lens: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    lengthen: bool = True

    @classmethod
    def of(cls, members: list[Member], max_attempts: int, *, lengthen: bool = True) -> "Tries":
        """The values that these teachers are configured with."""
        lens = tuple(member.teacher.max_model_len for member in members)
        return cls(max_attempts, lens, tuple(member.weight for member in members), lengthen)

    def max_model_len(self, row_id: str) -> int:
        """The `max_model_len` of the teacher that answers this row."""
        return self.max_model_lens[member_of_row(row_id, list(self.weights))]


def measure_calls(new: pa.Table, members: list[Member]) -> pa.Table:
    """Sums over new calls, in one row: their number, those that fail without being made, and tokens of the others."""
    weights = [member.weight for member in members]
    sums = {"new": new.num_rows, "over_long": 0, "prompt_tokens": 0, "reply_limit": 0}
    for call in new.select(["row_id", "messages", "max_tokens"]).to_pylist():
        teacher = members[member_of_row(call["row_id"], weights)].teacher
        length, limit = num_prompt_tokens(call["messages"], teacher), call["max_tokens"]
        # Only vllm obeys this limit, and it makes every call that leaves room for a token of the reply.
        room = teacher.max_model_len - length if teacher.backend == "vllm" else limit
        found = {"prompt_tokens": length, "reply_limit": min(room, limit)} if room > 0 else {"over_long": 1}
        for name, number in found.items():
            sums[name] += number
    return pa.table({name: [value] for name, value in sums.items()})


def asked_calls(keyed: pa.Table) -> pa.Table:
    """The rows that ask something, in the columns of CALLS."""
    return keyed.filter(pc.is_valid(keyed["messages"])).select(CALLS.names).cast(CALLS)


def new_calls(calls: pa.Table, records: pa.Table, tries: Tries) -> pa.Table:
    """Within one partition: the calls that no record settles.

    `max_model_len` is not in the key, because it affects only prompts that were too long and replies that it cut off.

    Args:
        calls: columns of CALLS.
        records: columns of KNOWN.
        tries: decides which records settle a call.
    """
    records = adopted(records, calls)
    void = _over_another_limit(records, tries)
    if tries.lengthen:
        void = pc.or_(void, _cut_by_a_smaller_limit(records, calls, tries))
    settled = _settled_keys(records.filter(pc.invert(void)).select(["call_key", "error"]), tries.max_attempts)
    return calls.filter(pc.invert(pc.is_in(calls["call_key"], settled["call_key"].combine_chunks())))


def adopted(records: pa.Table, calls: pa.Table) -> pa.Table:
    """The records, each with the key of the call that it answers, even if it was made under another length limit.

    A record answers a call under another limit if its reply ended by itself or is at least as long as the new limit, or
    if it failed in a way that no limit changes. A reply that was cut off by a smaller limit keeps its old key, so the
    call is made again; so does a call that an endpoint's context had no room for.

    Args:
        records: columns of KNOWN.
        calls: call_key, base_key, max_tokens.
    """
    if not records.num_rows or records["base_key"].null_count == records.num_rows:
        return records
    place = pc.index_in(records["base_key"], calls["base_key"].combine_chunks(), skip_nulls=True)
    limit = calls["max_tokens"].combine_chunks().take(place.combine_chunks())
    used = pc.add(records["prompt_tokens"], records["generated_tokens"])
    by_context = pc.greater_equal(used, records[CONTEXT.name])  # `new_calls` checks whether max_model_len has grown
    long_enough = pc.or_kleene(pc.greater_equal(records["generated_tokens"], limit), by_context)
    is_whole = pc.or_kleene(pc.not_equal(records["finish_reason"], "length"), long_enough)
    is_final = pc.and_not(pc.starts_with(records["error"], FATAL), _begins(records["error"], _OVER_CONTEXT))
    settles = pc.or_(pc.and_kleene(pc.equal(records["error"], ""), is_whole), is_final)
    takes = pc.and_kleene(pc.is_valid(place), pc.fill_null(settles, False))
    takes = pc.and_(takes, pc.invert(pc.is_in(records["call_key"], calls["call_key"].combine_chunks())))
    theirs = calls["call_key"].combine_chunks().take(place.combine_chunks())
    keys = pc.if_else(takes, theirs, records["call_key"].combine_chunks())
    return records.set_column(records.column_names.index("call_key"), REPLIES.field("call_key"), keys)


def _over_another_limit(records: pa.Table, tries: Tries) -> pa.Array:
    """Whether each record's call was too long for its teacher under another `max_model_len` than now.

    An endpoint has a limit of its own, which nobody tells us: its refusals count as made under ours.
    """
    places: list[int] = pc.indices_nonzero(_begins(records["error"], (OVER_LONG, *_OVER_CONTEXT))).to_pylist()
    found = [False] * records.num_rows
    for place, record in zip(places, records.take(pa.array(places, pa.int64())).to_pylist(), strict=True):
        limit = tries.max_model_len(record["row_id"])
        if record["error"].startswith(OVER_LONG):
            found[place] = not record["error"].startswith(f"{OVER_LONG}{limit};")
        else:
            found[place] = record[CONTEXT.name] not in (None, limit)
    return pa.array(found, pa.bool_())


def _begins(errors: pa.ChunkedArray, beginnings: tuple[str, ...]) -> pa.ChunkedArray:
    return reduce(pc.or_, (pc.starts_with(errors, beginning) for beginning in beginnings))


def _cut_by_a_smaller_limit(records: pa.Table, calls: pa.Table, tries: Tries) -> pa.Array:
    """Whether each record's reply was cut off by a `max_model_len` that is larger now, and not by the call's limit."""
    cut = pc.or_(
        pc.fill_null(pc.equal(records["finish_reason"], "length"), False), pc.equal(records["error"], CUT_TEXTLESS)
    )
    places: list[int] = pc.indices_nonzero(cut).to_pylist()
    found = [False] * records.num_rows
    if places:
        of_call = calls.select(["call_key", "row_id", "max_tokens"]).to_pylist()
        asked = {call["call_key"]: call for call in of_call}
        for place, record in zip(places, records.take(pa.array(places)).to_pylist(), strict=True):
            call = asked.get(record["call_key"])
            found[place] = call is not None and _had_less_room(record, call, tries)
    return pa.array(found, pa.bool_())


def _had_less_room(record: dict[str, Any], call: dict[str, Any], tries: Tries) -> bool:
    generated: int = record["generated_tokens"]
    room: int = record[CONTEXT.name] or record["prompt_tokens"] + generated
    return generated < call["max_tokens"] and room < tries.max_model_len(call["row_id"])


def _settled_keys(known: pa.Table, max_attempts: int) -> pa.Table:
    """Keys of calls that were answered, have failed `max_attempts` times, or have failed for good (FATAL)."""
    known = known.append_column("answered", pc.equal(known["error"], ""))
    known = known.append_column("fatal", pc.starts_with(known["error"], FATAL))
    table = known.group_by("call_key").aggregate([("answered", "any"), ("fatal", "any"), ("call_key", "count")])
    settled = pc.or_(table["answered_any"], pc.greater_equal(table["call_key_count"], max_attempts))
    settled = pc.or_(settled, table["fatal_any"])
    return table.filter(settled).select(["call_key"])


def without_replies(keyed: pa.Table) -> pa.Table:
    """Rows that ask nothing, with null in the columns of a reply."""
    rows = keyed.drop_columns([*KEY_COLUMNS, *CALL_COLUMNS])
    for name in REPLY_COLUMNS:
        rows = rows.append_column(REPLIES.field(name), pa.nulls(rows.num_rows, REPLIES.field(name).type))
    return rows


def merge(rows: pa.Table, replies: pa.Table) -> pa.Table:
    """Within one partition: give every row its reply, or else its failure; replies that no row asks for are dropped.

    Args:
        rows: KEY_COLUMNS, CALL_COLUMNS, and any others.
        replies: columns of KEYED_REPLIES.
    """
    # The error "" sorts first, and "stop" before "length": the first record of a key is an answer if there is one. If
    # a cut-off answer was asked for again, it is the whole one, or else the longest.
    replies = adopted(replies, rows).drop_columns(["row_id", "base_key", CONTEXT.name])
    order = [("error", "ascending"), ("finish_reason", "descending"), ("generated_tokens", "descending")]
    replies = replies.sort_by([("call_key", "ascending"), *order])
    first = replies.group_by("call_key", use_threads=False).aggregate([(name, "first") for name in REPLY_COLUMNS])
    first = first.select(["call_key", *(f"{name}_first" for name in REPLY_COLUMNS)]).rename_columns(
        ["call_key", *REPLY_COLUMNS]
    )
    joined = rows.drop_columns(list(CALL_COLUMNS)).join(first, "call_key", join_type="left outer")
    return joined.drop_columns([*KEY_COLUMNS])
