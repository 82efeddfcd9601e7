"""The `--plan` report: the assets that a run would make and why, its teacher calls, and the resources it needs."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from cluster.runtime import cluster_nodes
from flows.exit_codes import DONE, UNUSABLE
from flows.failures import words_of
from flows.graph import RAW_INSTRUCTIONS
from flows.placement import GIB, demands
from flows.run import Run
from flows.staleness import differences
from flows.teacher_work import ABOUT, AT_MOST, Work, teacher_work
from operators.models import ModelNotFoundError
from operators.redact import without_credentials
from operators.stage import Finding
from operators.teacher.budget import Tokens
from operators.train.memory import activation_bytes, bytes_per_worker, copied_bytes, host_bytes_per_worker, measure

UNREADABLE = ("source.path", "source.split", "decontaminate.files")  # findings after which nothing can be read


def print_plans(run: Run, refreshes: Sequence[str], findings: list[Finding], out: TextIO, *, canary: int) -> int:
    """Print a plan for each refresh; only the last one makes canary calls."""
    canaries = [0] * (len(refreshes) - 1) + [canary]
    plans = zip(refreshes, canaries, strict=True)
    return max(print_plan(run, key, findings, out, canary=calls) for key, calls in plans)


def print_plan(run: Run, refresh: str, findings: list[Finding], out: TextIO, *, canary: int = 0) -> int:
    """Print a line per asset, the expected teacher calls and resources; returns 2 if a run would be refused, else 0.

    Args:
        run: the configuration and its storage.
        refresh: the batch of source data.
        findings: from `preflight`.
        out: where to print.
        canary: number of teacher calls to make now, to predict the length of the other replies; they are kept.
    """
    refused = any(finding.fatal for finding in findings)
    out.write(f"plan of {run.config.name}, refresh {refresh}, storage {run.config.storage}\n")
    with run.store.looking():
        for asset, spec in run.specs.items():
            partition = refresh if spec.partitions_def is not None else None
            out.write(f"  {asset:<26}{_state(run, asset, partition, refresh)}\n")
    if not any(finding.key in UNREADABLE and finding.fatal for finding in findings):
        try:
            out.writelines(f"  {line}\n" for line in _work_lines(run, refresh, 0 if refused else canary))
        except ModelNotFoundError:
            pass  # a finding reports it
        except Exception as error:  # noqa: BLE001 - a custom step may raise any error, which would end the run too
            findings = [*findings, Finding(RAW_INSTRUCTIONS, words_of(error))]
            refused = True
    nodes = cluster_nodes()
    have = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))
    for demand in demands(run.config):
        out.write(f"  {demand.stage:<26}asks for {demand} of {have}\n")
    with suppress(ModelNotFoundError):
        out.write(f"  {'train':<26}{_training_memory(run)}\n")
    for finding in findings:
        out.write(f"  {'refused' if finding.fatal else 'warning'}: {finding}\n")
    return UNUSABLE if refused else DONE


def _training_memory(run: Run) -> str:
    size, train = measure(run.student, run.config.train.lora), run.config.train
    if not size.parameters:
        return "memory unknown, because the student is not in a folder"
    trained = f"{size.adapters:,} of adapters" if size.adapters else "all of them"
    held = bytes_per_worker(size, train) / GIB
    host = host_bytes_per_worker(size, train) / GIB
    offloaded = f" and {host:.2f} GiB of the host's" if host else ""
    kept = activation_bytes(run.student, train, run.config.pack.max_tokens) / GIB
    weights = f"{size.parameters:,} weights, trains {trained}: {held:.2f} GiB per worker{offloaded}"
    copied = copied_bytes(size, train) / GIB
    copies = f", {copied:.2f} GiB in all for copies of checkpoints" if copied else ""
    return f"{weights}, and about {kept:.2f} GiB of activations{copies}"


def _state(run: Run, asset: str, partition: str | None, planned: str) -> str:
    manifest = run.store.manifest(asset, partition)
    if manifest is None:
        return "new"
    try:
        reasons = differences(manifest.made_from, run.staleness.describe(asset, partition, planned))
    except ValueError as error:  # the source is gone; a finding already reports it
        return f"unknown: {without_credentials(str(error))}"
    rows = "" if manifest.rows is None else f", {manifest.rows} rows"
    return f"stale: {'; '.join(reasons)}{rows}" if reasons else f"cached{rows}"


def _work_lines(run: Run, refresh: str, canary: int) -> list[str]:
    """A line per kind of call and one for all: new and stored calls, and whether the budget allows the new ones."""
    budget = run.config.budget
    spent = run.ledger().tokens() if budget.is_limited() else Tokens()
    works, lines, total = teacher_work(run, refresh, canary), [], Tokens()
    for work in works:
        total += work.tokens
        exceeded = budget.exceeded_by(spent + total)
        lines.append(f"{_work_line(work)}{_cost(run, work.tokens)}{f'; will stop at {exceeded}' if exceeded else ''}")
    return [*lines, *total_lines(works, _cost(run, total))]


def total_lines(works: Sequence[Work], cost: str) -> list[str]:
    """The line of all calls, and one that says why their number is not exact, if it is not."""
    reaches = {work.reach for work in works if work.new}
    reach = ABOUT if ABOUT in reaches else AT_MOST if AT_MOST in reaches else ""
    new, total = sum(work.new for work in works), sum((work.tokens for work in works), Tokens())
    replies = ABOUT if any(work.lengths_known for work in works) else AT_MOST
    told = f"about {total.prompt} prompt and {replies}{total.generated} reply tokens"
    line = f"{'all teacher calls':<26}{reach}{new} new calls; {told}{cost}"
    causes = {
        AT_MOST: "at most: whether these calls are needed depends on replies that do not exist yet",
        ABOUT: "about: estimated from the earlier replies of the same stage",
    }
    return [line, *(f"{'':<26}{cause}" for key, cause in causes.items() if key in reaches)]


def _work_line(work: Work) -> str:
    reach = "about" if work.lengths_known else "at most"  # from a canary or an earlier run
    return (
        f"{work.name:<25} {work.reach}{work.new} new calls, {work.known} from the ledger, "
        f"{work.over_long} over-long; about {work.tokens.prompt} prompt and {reach} {work.tokens.generated} "
        "reply tokens"
    )


def _cost(run: Run, tokens: Tokens) -> str:
    cost = run.config.budget.cost(tokens)
    return f", cost {cost:.2f}" if cost else ""
