"""Prints at the end of a run what was made, and which records, calls and replies failed or were not read."""

from collections.abc import Mapping
from typing import Any, TextIO

from cluster.manifest import Manifest
from flows.graph import EVALUATION, RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS, STUDENT
from flows.results import UNUSED_COLUMNS
from flows.retention import DELETED_STUDENTS
from flows.run import FILES_OF_OTHER_SPLITS, Run
from flows.training_start import GENERAL_OUTCOMES
from operators.columns import ACTIVE, QUARANTINED
from operators.read.drop_contaminated import CONTAMINATED
from operators.read.drop_near_duplicates import NEAR_DUPLICATE
from operators.read.reasons import told
from operators.reflect.reflect import UNREAD_REPLIES, WITHOUT_REPLY

Terminal = tuple[TextIO, TextIO]  # results, and progress and errors

DROPPED = "dropped:"
MANY = 0.1  # share of a refresh's rows; if more resemble others, a person should look at them


def tell_what_was_made(run: Run, terminal: Terminal) -> None:
    """Print a line for each asset that this run made, and one for each kind of problem that a person should check."""
    out, err = terminal
    order = list(run.specs)
    for asset, refresh in sorted(run.store.made, key=lambda made: (order.index(made[0]), str(made[1]))):
        manifest = run.store.manifest(asset, refresh)
        if manifest is None:
            continue
        rows = "" if manifest.rows is None else f"{manifest.rows} rows in "
        peak = f"{manifest.peak_memory_mib} MiB at its peak"
        out.write(f"made {asset}: {rows}{manifest.seconds} s, {peak}\n")
        out.writelines(f"{asset}: {line}\n" for line in [*_left_out(asset, manifest), *_scores(asset, manifest)])
        err.writelines(f"{asset}: {line}\n" for line in _to_look_at(asset, manifest, run.config.storage))


def _left_out(asset: str, manifest: Manifest) -> list[str]:
    """How many rows each reason took; the rows that are quarantined are named elsewhere."""
    if asset not in (RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS):
        return []
    taken = {name.removeprefix(DROPPED): n for name, n in manifest.outcomes.items() if name.startswith(DROPPED) and n}
    named = ", ".join(f"{reason} {number}" for reason, number in sorted(taken.items(), key=lambda each: -each[1]))
    return [f"{sum(taken.values())} of {manifest.rows} rows are left out: {named}"] if taken else []


def _harness(asset: str, manifest: Manifest) -> Mapping[str, Any]:
    """What an evaluation found on the tasks of lm-evaluation-harness; empty if there was none."""
    value = manifest.value if asset == EVALUATION else None
    return (value or {}).get("harness") or {}


def _scores(asset: str, manifest: Manifest) -> list[str]:
    return [
        f"{one['task']} {one['metric']}: {', '.join(f'{role} {score:.4f}' for role, score in one['scores'].items())}"
        for one in _harness(asset, manifest).get("scores", ())
    ]


def _to_look_at(asset: str, manifest: Manifest, storage: str) -> list[str]:
    lines = []
    failed, again = (manifest.metrics.get(name, 0) for name in ("failed_calls", "retryable_calls"))
    if failed:
        lines.append(f"{failed} teacher calls failed; the next run makes {again} of them again")
    if without := manifest.metrics.get(WITHOUT_REPLY):
        lines.append(
            f"{without} rows have no reply and keep what they had: their calls failed in this run or earlier ones; "
            "after teacher.max_attempts a call is not made again; "
            f"see the errors by recycle-and-train browse {storage}"
        )
    if unread := _counts(manifest, UNREAD_REPLIES):
        named = ", ".join(f"{reason} {number}" for reason, number in unread.items())
        lines.append(
            f"{sum(unread.values())} replies could not be read, and their rows keep what they had: {named}; "
            f"see them by recycle-and-train browse {storage}; docs/operations.md says what to change"
        )
    bad = {name.removeprefix(QUARANTINED): n for name, n in manifest.outcomes.items() if name.startswith(QUARANTINED)}
    if asset == RAW_INSTRUCTIONS and bad:
        lines.append(f"{sum(bad.values())} of {manifest.rows} records cannot be used: {told(bad)}")
    resembling = sum(manifest.outcomes.get(outcome, 0) for outcome in (NEAR_DUPLICATE, CONTAMINATED))
    if asset == RAW_INSTRUCTIONS and resembling > MANY * (manifest.rows or 0):
        lines.append(
            f"{resembling} of {manifest.rows} rows resemble other rows or evaluation texts and are left out; see them "
            f"by recycle-and-train browse {storage}, and deduplicate and decontaminate in docs/configuration.md"
        )
    if others := _counts(manifest, FILES_OF_OTHER_SPLITS):
        named = ", ".join(f"{split} {number}" for split, number in others.items())
        lines.append(f"{sum(others.values())} files of other splits were not read: {named}; see source.split")
    lines += _of_training(asset, manifest)
    lines += [
        f"task {failed['task']} failed for {failed['role']}: {failed['reason']}"
        for failed in _harness(asset, manifest).get("failed", ())
    ]
    if deleted := _counts(manifest, DELETED_STUDENTS):
        named = ", ".join(deleted)
        lines.append(f"the folders of {len(deleted)} old students were deleted (release.keep_students): {named}")
    if ignored := _counts(manifest, UNUSED_COLUMNS):
        named = ", ".join(f"{name} ({number} rows)" for name, number in ignored.items())
        lines.append(f"nothing reads these columns of the source: {named}; see source.columns, pass_through")
    return lines


def _of_training(asset: str, manifest: Manifest) -> list[str]:
    general = _counts(manifest, GENERAL_OUTCOMES)
    notes = (manifest.value or {}).get("notes", ()) if asset == STUDENT else ()
    return [*([_general_line(general, manifest)] if general else []), *notes]


def _general_line(outcomes: Mapping[str, int], manifest: Manifest) -> str:
    """Of the general data: how many records can be used and are drawn, and why the others cannot."""
    others = {name.partition(":")[2]: number for name, number in outcomes.items() if name != ACTIVE}
    line = (
        f"general data: {outcomes.get(ACTIVE, 0)} of {sum(outcomes.values())} records can be used, "
        f"{manifest.metrics.get('general_rows', 0)} of them are drawn"
    )
    return f"{line}; left out: {told(others)}" if others else line


def _counts(manifest: Manifest, name: str) -> Mapping[str, int]:
    found = manifest.metrics.get(name)
    return found if isinstance(found, dict) else {}
