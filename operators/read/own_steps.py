"""A user's own filters and steps: Python functions that the configuration names, run between reading and the teacher.

A function takes one row, a dict with the columns of `columns.RAW`, and returns it (changed or not), None or False to
drop it, or a word that says why it is dropped. A function whose first parameter is annotated as a `Dataset` takes all
active rows and returns those to keep. Each row comes out exactly once: a row that the function does not return is
`dropped:<function>`, a row on which it raises is `quarantined:<function>_failed`.

Rows held out for evaluation go through the same functions, a `Dataset` step gets them in a call of its own: the student
is evaluated on texts that were cleaned like those it learns. They are not dropped, because which rows the teacher gets
is no question of evaluation, and students of different filters stay comparable.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from pydantic import Field, field_validator, model_validator
from ray.data import Dataset

from operators.chat_markup import escape
from operators.columns import ACTIVE, HELD_OUT, RAW, conform
from operators.join import ROWS_PER_PARTITION, cogroup
from operators.outside_text import is_damaged, replace_surrogates
from operators.read.drop_seen import SEEN
from operators.read.read_instructions import DUPLICATE
from operators.stage import Finding, StageConfig

NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
RETURNED = pa.field("returned", pa.string())  # names of the columns that a step on a Dataset returned
CHANGEABLE = ("instruction", "input", "response", "turns_before", "turns_after", "extra")
REASON_CHARS = 60
_FORMS = "it gets one row, a dict; with its first parameter annotated as Dataset it gets all rows"
AFTER = pa.schema([*RAW, RETURNED])
STEPPED = (ACTIVE, HELD_OUT)  # outcomes of the rows that steps get
RESERVED = frozenset({HELD_OUT, SEEN, DUPLICATE})  # outcomes that later code treats specially


class StepsConfig(StageConfig):
    """Own functions that change rows before the teacher sees them; the short form is `steps: [my_module:clean]`."""

    functions: tuple[str, ...] = Field(
        (),
        description="Python functions, each as `module:function`, that change or drop rows before the teacher sees "
        "them; Python looks for modules in the working directory first. A function gets one row, a dict, and returns "
        "it, or None to drop it, or a word that says why it is dropped; if its first parameter is annotated as "
        "`Dataset`, it gets all rows and returns those to keep. Columns that it does not return stay as they are. It "
        "changes rows held out for evaluation too, but does not drop them. `--plan` and `--doctor` try it on the first "
        "rows.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"functions": value} if isinstance(value, list | tuple) else value

    @field_validator("functions")
    @classmethod
    def _can_be_called(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            load_function(name)
        return names

    def identity(self) -> dict[str, Any]:
        """The functions by name and source, so that the rows become stale if a function changes."""
        return {"functions": [[name, _source_hash(name)] for name in self.functions]}


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: it says what is wrong, and the cure.
    """
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{name!r} does not name a function; write my_module:my_function")
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()  # noqa: PTH109 - an entry of sys.path
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{name}: {error}; put the module into the working directory or on PYTHONPATH") from None
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{name}: module {module_name} has no function {function_name}")
    ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call] # workers need not have the file
    return function  # type: ignore[no-any-return]


def apply_steps(rows: Dataset, config: StepsConfig, special_tokens: frozenset[str]) -> Dataset:
    """Run the configured functions on the rows, in order.

    Columns in and out:
        columns.RAW; as many rows, with unchanged ids. Texts that a function wrote are escaped like the source.

    Raises:
        ValueError: a function returned rows that it was not given, or one of them twice.
    """
    for name in config.functions:
        function = load_function(name)
        label = name.rpartition(":")[2]
        if _takes_datasets(function):
            rows = _with_dataset_step(rows, function, label, special_tokens)
        else:
            step = partial(map_rows, function=function, label=label, special_tokens=special_tokens)
            rows = rows.map_batches(step, batch_format="pyarrow", num_cpus=0.5)
    return rows.materialize() if config.functions else rows  # the next steps read them more than once


def examine_steps(config: StepsConfig, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Try the functions of one row on the first rows of the source; a function that raises on all of them is fatal.

    The message has an error's text only if it is about the function itself, because others may repeat a row's text.

    Args:
        config: the functions.
        rows: with the columns of columns.RAW, active ones.
    """
    found: list[Finding] = []
    tried = list(rows)
    for name in config.functions:
        function = load_function(name)
        if _takes_datasets(function) or not tried:
            break
        errors: list[Exception] = []
        kept = []
        for row in tried:
            try:
                result = function(dict(row))
            except Exception as error:  # noqa: BLE001 - a user's function may raise anything
                errors.append(error)
                continue
            if result is not None and not isinstance(result, bool | str | dict):
                errors.append(TypeError(f"it returned {type(result).__name__}"))
            elif result is True or isinstance(result, dict):
                kept.append(row if result is True else result)
        if errors:
            text = f"{name} raises {_told(errors[0])} on {len(errors)} of the first {len(tried)} rows; {_FORMS}"
            found.append(Finding("steps.functions", text, fatal=len(errors) == len(tried)))
        tried = kept
    return found


def _told(error: Exception) -> str:
    is_about_code = isinstance(error, AttributeError | NameError | TypeError | ImportError)
    return f"{type(error).__name__}: {error}" if is_about_code else type(error).__name__


def map_rows(rows: pa.Table, function: Callable[..., Any], label: str, special_tokens: frozenset[str]) -> pa.Table:
    """Run a function of one row on the active rows of a batch, and on those that are held out."""
    records = rows.to_pylist()
    for at, row in enumerate(records):
        if row["outcome"] not in STEPPED:
            continue
        try:
            found = function(dict(row))
        except Exception:  # noqa: BLE001 - a user's function may raise anything; the row says which one did
            records[at] = row | {"outcome": f"quarantined:{label}_failed"}
            continue
        if found is None or isinstance(found, bool | str):
            records[at] = row if found is True else _left_out(row, _word(found or "") or label)
        else:
            records[at] = _taken(row, found, label, special_tokens)
    return pa.Table.from_pylist(records, schema=rows.schema)


def _taken(row: dict[str, Any], found: Any, label: str, special_tokens: frozenset[str]) -> dict[str, Any]:
    """The row with the texts that a function returned; a function cannot change id, origin and outcome."""
    if not isinstance(found, dict):
        return row | {"outcome": f"quarantined:{label}_failed"}
    texts = {name: found.get(name, row.get(name)) for name in CHANGEABLE if name in row}
    if not all(text is None or isinstance(text, str) for text in texts.values()):
        return row | {"outcome": f"quarantined:{label}_failed"}
    written = {name: escape(replace_surrogates(text or ""), special_tokens) for name, text in texts.items()}
    if not all(_is_readable(name, text) for name, text in written.items()):
        return row | {"outcome": f"quarantined:{label}_failed"}
    row = row | written
    if any(is_damaged(text) for text in written.values()):
        return row | {"outcome": "quarantined:control_characters"}
    empty = next((name for name in ("instruction", "response") if not row[name].strip()), None)
    return row | {"outcome": f"quarantined:empty_{empty}"} if empty else row


def _is_readable(name: str, text: str) -> bool:
    """Whether later stages can read what a function wrote: turns and extra columns must be JSON or empty."""
    if not text or name not in ("turns_before", "turns_after", "extra"):
        return True
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if name == "extra":
        return isinstance(value, dict)
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


def _with_dataset_step(
    rows: Dataset, function: Callable[[Dataset], Dataset], label: str, special_tokens: frozenset[str]
) -> Dataset:
    rows = rows.materialize()  # read twice: by the function, and to find the rows that it left out
    after = _after(rows, ACTIVE, function, label)
    if rows.filter(expr=ray.data.expressions.col("outcome") == HELD_OUT).count():
        after = after.union(_after(rows, HELD_OUT, function, label))
    keep = partial(keep_every_row, label=label, special_tokens=special_tokens)
    num_blocks = 1 + 2 * rows.count() // ROWS_PER_PARTITION
    return cogroup((rows, RAW), (after, AFTER), "row_id", num_blocks, keep, num_cpus=0.5)


def _after(rows: Dataset, outcome: str, function: Callable[[Dataset], Dataset], label: str) -> Dataset:
    """What the function returns for the rows with this outcome, in the columns of AFTER."""
    after = function(rows.filter(expr=ray.data.expressions.col("outcome") == outcome))
    if not isinstance(after, Dataset):
        raise ValueError(f"steps: {label} returned {type(after).__name__}; a step on a Dataset returns a Dataset")
    return after.map_batches(partial(as_returned, label=label), batch_format="pyarrow", num_cpus=0.25)


def as_returned(rows: pa.Table, label: str) -> pa.Table:
    """What a step returned, in the columns of AFTER: a column that is not there is told from one of nulls.

    Raises:
        ValueError: there are rows, but no row_id.
    """
    if rows.num_rows and "row_id" not in rows.column_names:
        raise ValueError(f"steps: {label} returned rows without row_id; a step keeps the column row_id")
    names = " ".join(name for name in CHANGEABLE if name in rows.column_names)
    return conform(rows, RAW).append_column(RETURNED, pa.array([names] * rows.num_rows, RETURNED.type))


def keep_every_row(before: pa.Table, after: pa.Table, label: str, special_tokens: frozenset[str]) -> pa.Table:
    """Each row of `before` once, with what the step made of it.

    Args:
        before: columns.RAW, some rows that the step got.
        after: columns of AFTER, all rows with these ids that the step returned; a column that it did not return stays.
        label: name of the step, for outcomes and errors.
        special_tokens: of teacher and student.
    """
    rows, found = before.to_pylist(), {}
    known = {row["row_id"] for row in rows}
    for row in after.to_pylist():
        if row["row_id"] in found or row["row_id"] not in known:
            fault = "twice" if row["row_id"] in found else "which it was not given"
            raise ValueError(
                f"steps: {label} returned row {row['row_id']} {fault}; a step may change and drop rows, but not add any"
            )
        found[row["row_id"]] = {name: row[name] for name in row[RETURNED.name].split()}
    for at, row in enumerate(rows):
        if row["outcome"] in STEPPED:
            changed = found.get(row["row_id"])
            rows[at] = _left_out(row, label) if changed is None else _taken(row, changed, label, special_tokens)
    return pa.Table.from_pylist(rows, schema=RAW)


def _takes_datasets(function: Callable[..., Any]) -> bool:
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and (
        first.annotation is Dataset or str(first.annotation).rpartition(".")[2].strip("'\"") == "Dataset"
    )


def _left_out(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """The row after a step decided to drop it; a row that is held out stays so."""
    return row if row["outcome"] == HELD_OUT else row | {"outcome": _dropped(reason)}


def _dropped(reason: str) -> str:
    outcome = f"dropped:{reason}"
    return f"dropped:step_{reason}" if outcome in RESERVED else outcome


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.casefold()).strip("_")[:REASON_CHARS]


def _source_hash(name: str) -> str:
    """Hash of the whole module's source, because the function may call others in it."""
    try:
        module = sys.modules[load_function(name).__module__]
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    except (ValueError, OSError, TypeError, KeyError):
        return "unknown"
