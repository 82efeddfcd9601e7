"""The teacher ledger: every reply is stored raw before it is parsed, and no answered call is made twice.

A call is one Parquet row under `<folder>/<stage>/`, with a hash of everything that determines the reply as its key
(`calls.call_key`). A call whose key is in the ledger gets the stored reply: after a crash, in the next scheduled run,
or when a later stage changes. After a change of the length limit, only replies that the old limit cut off are asked for
again. Files appear whole or not at all, and a file that lost its end is set aside. Small files are merged into large
ones, and deleted only after that. Failed calls are kept too: they are made again until they have failed
`teacher.max_attempts` times.

Cost: two shuffles per stage, one of the calls with the stored keys (to find new calls) and one of the rows with the
replies. If the calls are few, other replies are not read into the shuffle. Nothing is collected on the driver.
`dispatch` says how calls are made and what may stop them; `ledger_tables` has the joins within one partition.
"""

import datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.join import add_up, cogroup
from operators.parquet_log import ParquetLog, write_whole
from operators.progress import report_progress
from operators.stage import require_columns
from operators.teacher import ledger_tables as tables
from operators.teacher.budget import BudgetConfig, Tokens
from operators.teacher.calls import CALLS, REPLIES, base_key, call_key
from operators.teacher.config import TeacherConfig
from operators.teacher.dispatch import Asking, TeacherStoppedError
from operators.teacher.engine_pool import engine_starts
from operators.teacher.ledger_tables import CALL_COLUMNS, REPLY_COLUMNS
from operators.teacher.variants import Member, member_of_row, members_of, teacher_of

RECORD = pa.schema([*REPLIES, ("stage", pa.string()), ("model", pa.string()), ("created", pa.string()), tables.CONTEXT])
ROWS_PER_PARTITION = 50_000
METRICS = (
    "calls",
    "cached_calls",
    "failed_calls",
    "retryable_calls",
    "prompt_tokens",
    "generated_tokens",
    "engine_starts",
    "engine_deaths",
)
__all__ = ["RECORD", "REPLY_COLUMNS", "Ledger"]


class Ledger:
    """The store of all teacher calls of one project; `metrics()` has the counts and cost of this process's calls."""

    def __init__(
        self, folder: str, budget: BudgetConfig | None = None, *, offline: bool = False, prompts: str = ""
    ) -> None:
        """Open the ledger at an absolute path or a URI; it need not exist.

        Args:
            folder: has one folder per stage.
            budget: limits for all calls of the ledger together; no limit if None.
            offline: make no call; a missing reply is an error.
            prompts: folder that keeps the prompts for people to read, one folder per stage; "" keeps none.
        """
        self._folder, self._offline, self._prompts = folder, offline, prompts
        self.files = ParquetLog(folder)
        self._asked = ParquetLog(prompts) if prompts else None
        self._budget = budget or BudgetConfig()
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """METRICS and the cost of all calls of `answer` so far; the next run makes the retryable_calls again."""
        if not self._metrics:
            return {}
        used = Tokens(int(self._metrics["prompt_tokens"]), int(self._metrics["generated_tokens"]))
        return self._metrics | {"cost": self._budget.cost(used)}

    def tokens(self, *stages: str) -> Tokens:
        """The tokens of the calls of these stages so far. Reads two columns on the driver, batch by batch.

        If no stage is named: all tokens that were paid, also those of failed calls that do not count as attempts.
        """
        spent, columns = Tokens(), ["prompt_tokens", "generated_tokens"]
        for stage in stages or self.files.stages():
            for batch in self.files.batches(stage, columns, discounted=not stages):
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
        """Give every call its reply; the teacher is asked only for replies that the ledger does not hold.

        New calls are made and stored before this returns; the result itself is lazy.

        Args:
            calls: see below.
            teacher: who answers.
            stage: names the part of the ledger, and the stage in errors.
            first: largest number of new calls to make; None makes all.
            optional: an offline ledger leaves these calls without a reply instead of raising an error.

        Columns in:
            row_id: str, unique; messages: JSON list of {"role", "content"}, null where nothing is asked;
            schema: JSON schema of the reply or ""; max_tokens: int32; any others pass through.
        Columns out:
            the same without messages, schema and max_tokens; reply: str, null if not asked or failed; finish_reason:
            "stop" | "length"; prompt_tokens, generated_tokens: int32; error: str, "" if answered.

        Raises:
            ray.exceptions.RayTaskError: from a ValueError that names the missing columns.
            TeacherStoppedError: see `dispatch.Asking.run`; or the ledger is offline and lacks replies.
        """
        broken = self._tidy(stage)
        members = members_of(teacher_of(teacher, stage))
        keyed, asked = _keyed(calls, members, stage)
        num_rows, num_asked, schema = _survey(calls, stage)
        if not num_asked:
            self._add_metrics({})
            return keyed.map_batches(tables.without_replies, batch_format="pyarrow", num_cpus=0.25)
        attempts = 1 if self._offline else teacher.max_attempts
        tries = tables.Tries.of(members, attempts, lengthen=not self._offline)
        pending = self._without_known(asked, stage, tries, num_asked)
        if first is not None or self.files.of(stage) or len(members) > 1:
            # Before the engines start: once they run, the tasks of a shuffle may wait forever for a free CPU.
            pending = (pending if first is None else pending.limit(first)).materialize()
            num_new = pending.count()
        else:
            num_new = num_asked
        cut_off = f", {broken} broken files set aside" if broken else ""
        report_progress(stage, more=num_new, note=f"{num_asked - num_new} from the ledger{cut_off}")
        made: dict[str, int] = {"cached_calls": num_asked - num_new}
        if num_new and self._offline and not optional:
            raise TeacherStoppedError(
                f"{stage}: the ledger lacks {num_new} of {num_asked} replies, and --reparse makes no call; "
                "the prompt, the teacher or the rows have changed: run without --reparse"
            )
        if num_new and not self._offline:
            made |= {"calls": num_new, **self._make_calls(pending, members, stage, num_asked - num_new)}
            if made["failed_calls"] and first is None:
                made["retryable_calls"] = self._without_known(asked, stage, tries, num_asked).count()
        self._add_metrics(made)
        return self._bring_replies(keyed, stage, num_rows, schema)

    def stored(self, calls: Dataset, teacher: TeacherConfig, stage: str) -> Dataset:
        """Like `answer`, but with stored replies only: this makes no call and changes no file."""
        keyed, _ = _keyed(calls, members_of(teacher_of(teacher, stage)), stage)
        num_rows, _, schema = _survey(calls, stage)
        return self._bring_replies(keyed, stage, num_rows, schema)

    def count_calls(self, calls: Dataset, teacher: TeacherConfig, stage: str) -> dict[str, int]:
        """Count what `answer` would do, without a call: calls asked, new, over_long (new and too long for the teacher).

        Also prompt_tokens and predicted reply_tokens of the new calls that are not over-long, and known_replies, the
        number of replies in the ledger for this stage. Their mean length is the prediction for each call; without any
        it is the call's limit.
        """
        members = members_of(teacher_of(teacher, stage))
        _, asked = _keyed(calls, members, stage)
        num_asked = asked.count()
        new = self._without_known(asked, stage, tables.Tries.of(members, teacher.max_attempts), num_asked)
        measure = partial(tables.measure_calls, members=members)
        measured = new.map_batches(measure, batch_format="pyarrow", num_cpus=0.25)
        counts = add_up(measured, ["new", "over_long", "prompt_tokens", "reply_limit"])
        limit, known = counts.pop("reply_limit"), self.files.read(stage, ["generated_tokens"])
        mean: Any = known.mean("generated_tokens") if known is not None else 0
        num_known = self.files.count(stage)
        return {
            "asked": num_asked,
            **counts,
            "known_replies": num_known,
            "reply_tokens": int((counts["new"] - counts["over_long"]) * float(mean)) if num_known else limit,
        }

    def _make_calls(self, pending: Dataset, members: list[Member], stage: str, num_known: int) -> dict[str, int]:
        """Let each teacher answer its rows; all replies are in the ledger even if one of the teachers stops."""
        made = dict.fromkeys(("failed_calls", "prompt_tokens", "generated_tokens", "engine_deaths"), 0)
        starts = engine_starts()
        weights = [member.weight for member in members]
        for number, member in enumerate(members):
            commit = partial(_commit, folder=f"{self._folder}/{stage}", stage=stage, teacher=member.teacher)
            spent = self.tokens() if self._budget.is_limited() else Tokens()
            mine = partial(_calls_of_member, weights=weights, number=number)
            own = pending if len(members) == 1 else pending.map_batches(mine, batch_format="pyarrow", num_cpus=0.25)
            discount = self.files.discount
            prompts = self._prompts and f"{self._prompts}/{stage}"
            asking = Asking(stage, member.teacher, self._budget, commit, own, spent, num_known, discount, prompts)
            totals = asking.run()
            made["failed_calls"] += totals.failed
            made["prompt_tokens"] += totals.used.prompt
            made["generated_tokens"] += totals.used.generated
            made["engine_deaths"] += totals.engine_deaths
        self._tidy(stage)
        return made | {"engine_starts": engine_starts() - starts}

    def _tidy(self, stage: str) -> int:
        """Merge small files of replies and of prompts; returns the number of files of replies that were set aside."""
        if self._asked is not None:
            self._asked.tidy(stage)
        return self.files.tidy(stage)

    def _add_metrics(self, made: dict[str, int]) -> None:
        for name in METRICS:
            self._metrics[name] = self._metrics.get(name, 0) + made.get(name, 0)

    def _without_known(self, asked: Dataset, stage: str, tries: tables.Tries, num_rows: int) -> Dataset:
        if not self.files.of(stage):
            return asked
        keys = asked.select_columns(["row_id"])
        known, num_known = self.files.read_for(keys, num_rows, stage, tables.KNOWN.names)
        new_calls = partial(tables.new_calls, tries=tries)
        return cogroup((asked, CALLS), (known, tables.KNOWN), "row_id", _num_blocks(num_rows + num_known), new_calls)

    def _bring_replies(self, keyed: Dataset, stage: str, num_rows: int, schema: pa.Schema) -> Dataset:
        if not self.files.of(stage):
            return keyed.map_batches(tables.without_replies, batch_format="pyarrow", num_cpus=0.25)
        for name in tables.KEY_COLUMNS:
            schema = schema.append(CALLS.field(name))
        keys = keyed.select_columns(["row_id"])
        known, num_known = self.files.read_for(keys, num_rows, stage, tables.KEYED_REPLIES.names)
        sides = (keyed, schema), (known, tables.KEYED_REPLIES)
        return cogroup(*sides, "row_id", _num_blocks(num_rows + num_known), tables.merge)


def _commit(replies: pa.Table, name: str, folder: str, stage: str, teacher: TeacherConfig) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    told = (stage, teacher.model, now, teacher.max_model_len)
    columns = [*replies.columns, *(pa.array([value] * replies.num_rows) for value in told)]
    file = write_whole(folder, pa.table(columns, names=RECORD.names).cast(RECORD), name)
    report_progress(stage, rows=replies.num_rows, tokens=pc.sum(replies["generated_tokens"]).as_py() or 0)
    return file


def _num_blocks(num_rows: int) -> int:
    return 1 + num_rows // ROWS_PER_PARTITION


def _keyed(calls: Dataset, members: list[Member], stage: str) -> tuple[Dataset, Dataset]:
    """All calls with their keys; and, in the columns of CALLS, only those that ask something."""
    add_keys = partial(_add_keys, stage=stage, members=[_KeyParts(member) for member in members])
    keyed = calls.map_batches(add_keys, batch_format="pyarrow", num_cpus=0.25)
    return keyed, keyed.map_batches(tables.asked_calls, batch_format="pyarrow", num_cpus=0.25)


class _KeyParts:
    """A teacher's parts of its calls' keys, computed once, because this reads all weights of a model's folder."""

    def __init__(self, member: Member) -> None:
        self.parts, self.weight = member.teacher.key_parts(), member.weight
        self.max_tokens = member.teacher.max_tokens


def _add_keys(calls: pa.Table, stage: str, members: list[_KeyParts]) -> pa.Table:
    weights = [member.weight for member in members]
    keys, bases, limits = [], list[str | None](), []
    for call in calls.select(["row_id", *CALL_COLUMNS]).to_pylist():
        member = members[member_of_row(call["row_id"], weights)]
        call["max_tokens"] = member.max_tokens or call["max_tokens"]
        limits.append(call["max_tokens"])
        asks = call["messages"] is not None
        keys.append(call_key(call, stage, member.parts) if asks else f"not asked {call['row_id']}")
        bases.append(base_key(call, stage, member.parts) if asks else None)
    place = calls.column_names.index("max_tokens")
    calls = calls.set_column(place, calls.field(place), pa.array(limits, calls.field(place).type))
    calls = calls.append_column("call_key", pa.array(keys, pa.string()))
    return calls.append_column("base_key", pa.array(bases, pa.string()))


def _calls_of_member(calls: pa.Table, weights: list[float], number: int) -> pa.Table:
    return calls.filter(pa.array([member_of_row(row_id, weights) == number for row_id in calls["row_id"].to_pylist()]))


def _survey(calls: Dataset, stage: str) -> tuple[int, int, pa.Schema]:
    """The number of rows, the number of rows that ask something, and the columns, in one pass.

    Asking Ray Data for the columns would compute the whole first block a second time.
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
