"""The command line: reads the configuration, checks that it can work, runs the graph, and says how it ended.

Exit codes: 0 done; 2 the configuration or the input cannot be used (one line says why); 3 an invariant or a blocking
check failed; 1 anything else.
"""

import argparse
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import dagster as dg

from cluster.dagster_home import driver_tags, history, reap
from cluster.files import StorageError, explained
from cluster.lease import StorageBusyError, lease
from cluster.refresh_key import require_refresh_key
from cluster.runtime import ClusterError, connected
from cluster.terminal import log_traceback, quiet_terminal
from flows.checks import SURVIVAL_CHECK
from flows.config import ConfigError, default_config, load_config
from flows.exit_codes import BROKEN_INVARIANT, DONE, FAILED, UNUSABLE
from flows.failures import root_cause, words_of
from flows.graph import RAW_INSTRUCTIONS, REPORT, Graph
from flows.made import Terminal, tell_what_was_made
from flows.new_refresh import NEW, new_refreshes
from flows.plan_report import print_plans
from flows.preflight import PreflightError, preflight, require_sound
from flows.remake import assets_by_refresh, retract, stale_assets, tell_stale
from flows.run import Run, open_run
from flows.steps import print_step
from operators.files.damage import DamagedFileError
from operators.json_lines import JsonLines, Wrapper, wrapper_as_asked
from operators.models import ModelNotFoundError
from operators.progress import ProgressLines
from operators.redact import without_credentials
from operators.stage import Finding
from operators.teacher.dispatch import TeacherStoppedError
from operators.teacher.engine_pool import stopping_engines

OTHER_COMMANDS = "Other commands, each with --help: browse, releases, rollback, refreshes, retry, metrics."
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def run_flow(graph: Graph, argv: Sequence[str], terminal: Terminal | None = None) -> int:
    """Run the flow as the command line says; returns an exit code, see the module.

    Args:
        graph: to run.
        argv: the command line without the program's name.
        terminal: where to write results and errors; None means the process's own streams. The output of all libraries
            then goes to a file under `<storage>/logs`, whose path is printed.
    """
    arguments, plain = _parse(argv), terminal or (sys.stdout, sys.stderr)
    try:
        wrap = wrapper_as_asked(run=uuid.uuid4().hex[:12], refresh=arguments.refresh)
    except ValueError as error:
        plain[1].write(f"{error}\n")
        return UNUSABLE
    with ExitStack() as stack:
        code = _run_or_tell(graph, arguments, terminal, wrap, stack)
    out, _ = wrap(*plain)
    if isinstance(out, JsonLines):
        out.record("ended", "error" if code else "info", exit_code=code)
    return code


def _run_or_tell(
    graph: Graph,
    arguments: argparse.Namespace,
    terminal: Terminal | None,
    wrap: Wrapper,
    stack: ExitStack,
) -> int:
    """Run, and tell in one line each error that a person can do something about; returns the exit code."""
    storage = "the storage"
    out, err = wrap(*(terminal or (sys.stdout, sys.stderr)))
    try:
        selected = _selection(graph, arguments)
        _require_sense(arguments, selected)
        run = open_run(load_config(arguments.config, arguments.override), graph.specs, reparse=arguments.reparse)
        storage = run.config.storage
        if terminal is None:
            log = _log_file(run, arguments)
            out, err = stack.enter_context(quiet_terminal(log, wrap))
            out.write(f"storage: {run.config.storage}\nlog: {log}\n")
            out.flush()
        with ExitStack() as held:  # inside the try: errors while it releases things are reported like others
            return _run(graph, run, arguments, selected, held, (out, err))
    except (ConfigError, ModelNotFoundError, PreflightError) as error:
        err.write(f"{without_credentials(str(error))}\n")
        return UNUSABLE
    except (ClusterError, StorageBusyError, StorageError, TeacherStoppedError) as error:
        err.write(f"{without_credentials(str(error))}\n")
        return FAILED
    except DamagedFileError as error:  # from Ray's workers it comes with a whole traceback
        err.write(f"{str(error).rpartition(f'{DamagedFileError.__name__}: ')[2].splitlines()[0]}\n")
        return FAILED
    except OSError as error:
        log_traceback()
        err.write(f"{without_credentials(explained(error, storage) or words_of(error))}\n")
        return FAILED


def _run(
    graph: Graph,
    run: Run,
    arguments: argparse.Namespace,
    selected: Sequence[str],
    stack: ExitStack,
    terminal: Terminal,
) -> int:
    out, _ = terminal
    writes = _writes(arguments)
    if writes:
        stack.enter_context(lease(run.config.storage, run.config.storage_lost_after_seconds))
    logs = stack.enter_context(connected())
    if arguments.step is not None:
        return print_step(run, arguments.step, out)
    refreshes = [arguments.refresh]
    if arguments.refresh == NEW and not (refreshes := new_refreshes(run, out, writes=writes and not arguments.plan)):
        return DONE
    if arguments.retract:
        refreshes, selected = retract(run, arguments.retract, out), [RAW_INSTRUCTIONS]
    elif arguments.stale:
        refreshes = run.store.refreshes(RAW_INSTRUCTIONS) or refreshes
    looked = [preflight(run, key, selected, thorough=arguments.doctor, holds_lease=writes) for key in refreshes]
    findings = list(dict.fromkeys(finding for found in looked for finding in found))
    if arguments.plan and arguments.stale:
        tell_stale(run, out)
        return print_findings(findings, out)
    if arguments.plan:
        return print_plans(run, refreshes, findings, out, canary=arguments.canary)
    if arguments.doctor:
        return print_findings(findings, out)
    require_sound(findings)
    out.writelines(f"warning: {finding}\n" for finding in findings)
    out.write(f"logs of engines and workers: {logs}\n")
    out.flush()
    code = _materialise(graph, run, refreshes, selected, terminal, stale=arguments.stale)
    if arguments.retract and code == DONE:
        tell_stale(run, out)
        out.write("the published data and the student hold these rows until a run with --stale\n")
    return code


def _require_sense(arguments: argparse.Namespace, selected: Sequence[str]) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: it names both options.
    """
    looks_only = arguments.plan or arguments.doctor or arguments.step is not None
    if arguments.retract == "":  # an unset variable of a script must not start a whole run
        raise ConfigError("--retract: name a file below source.path")
    if arguments.canary < 0:
        raise ConfigError(f"--canary: {arguments.canary}: give a number of calls, 1 or more")
    if arguments.canary and not arguments.plan:
        raise ConfigError("--canary: only with --plan; a run makes all its calls")
    if arguments.retract and (looks_only or selected or arguments.stale):
        raise ConfigError("--retract: not together with --plan, --doctor, --step, --select or --stale")
    if arguments.refresh == NEW and (arguments.retract or arguments.stale):
        raise ConfigError("--refresh new: not together with --retract or --stale")
    if arguments.stale and selected:
        raise ConfigError("--stale: not together with --select; it makes every stale asset again")


def _writes(arguments: argparse.Namespace) -> bool:
    """Whether this command line may change the storage; all others only read it, and write nothing there."""
    looks_only = arguments.plan or arguments.doctor or arguments.step is not None
    return bool(arguments.canary) or not looks_only


def _log_file(run: Run, arguments: argparse.Namespace) -> Path:
    """The file for the output of libraries."""
    if _writes(arguments):
        return Path(run.logs) / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.log"
    number, name = tempfile.mkstemp(prefix="recycle-and-train-", suffix=".log")
    os.close(number)
    return Path(name)


def print_findings(findings: Sequence[Finding], out: TextIO) -> int:
    """Print one line per finding; returns 2 if a run would be refused, else 0."""
    for finding in findings:
        out.write(f"{'refused' if finding.fatal else 'warning'}: {finding}\n")
    refused = any(finding.fatal for finding in findings)
    out.write("this configuration cannot run\n" if refused else "this configuration can run\n")
    return UNUSABLE if refused else DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flows/recycle_and_train.py", description="Recycle a data set, train on it.", epilog=OTHER_COMMANDS
    )
    parser.add_argument("--config", type=Path, default=default_config(), help="YAML file (%(default)s)")
    parser.add_argument("override", nargs="*", help="dotted.key=value, such as train.max_steps=20")
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument("--plan", action="store_true", help="execute nothing; say what would be done and why")
    looks.add_argument("--doctor", action="store_true", help="execute nothing; check storage, source, models, cluster")
    looks.add_argument("--step", type=int, metavar="N", help="say which rows training step N (from 0) learns from")
    parser.add_argument("--canary", type=int, default=0, metavar="N", help="with --plan: first make N calls")
    parser.add_argument("--reparse", action="store_true", help="read the stored replies again; make no teacher call")
    parser.add_argument("--stale", action="store_true", help="make every stale refresh again, then what depends on it")
    parser.add_argument("--retract", metavar="FILE", help="remove the rows of this source file")
    parser.add_argument("--select", metavar="ASSET,...", help="make only these assets")
    parser.add_argument("--refresh", default="base", metavar="KEY", help="batch of source data (%(default)s), or new")
    return parser.parse_intermixed_args(argv)


def _selection(graph: Graph, arguments: argparse.Namespace) -> list[str]:
    """The assets to make; an empty list means all."""
    try:
        require_refresh_key(arguments.refresh)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    names = arguments.select.split(",") if arguments.select is not None else []
    unknown = [name for name in names if name not in graph.specs]
    if unknown:
        raise ConfigError(
            f"--select: {', '.join(unknown) or 'nothing'}: no such asset; there are {', '.join(graph.specs)}"
        )
    return names


def _materialise(
    graph: Graph, run: Run, refreshes: Sequence[str], selected: Sequence[str], terminal: Terminal, *, stale: bool
) -> int:
    """Make the refreshes in this order, then once what is made over all of them; with `stale` only stale assets."""
    of_refresh, over_all = assets_by_refresh(run)
    together = stale or (len(refreshes) > 1 and not selected)
    with history(Path(run.dagster_home)) as instance:
        reap(instance, run.config.storage)
        run.tidy()
        instance.add_dynamic_partitions(str(graph.refreshes.name), list(refreshes))
        # Leave the progress display, which draws its last lines, before the conclusion is printed.
        with ProgressLines(terminal[1]), stopping_engines():
            for refresh in refreshes:
                if stale and not stale_assets(run, refresh):
                    continue
                result = _make(graph, run, instance, refresh, of_refresh if together else selected)
                if not result.success:
                    break
            else:
                result = _make(graph, run, instance, refreshes[-1], over_all) if together else result
        if result.success:
            run.tidy()
            for refresh in refreshes if not selected else ():
                run.requests.remove(refresh)  # done, so the daemon must not ask for it again
        return _conclude(run, result, terminal)


def _make(
    graph: Graph, run: Run, instance: dg.DagsterInstance, refresh: str, selected: Sequence[str]
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [*graph.assets, *graph.checks],
        # Dagster refuses a partition key if no selected asset is partitioned, as with `--select student`.
        partition_key=refresh if graph.has_refreshes(selected) else None,
        instance=instance,
        resources={"run": run, "io_manager": run.asset_io()},
        selection=dg.AssetSelection.assets(*selected) if selected else None,
        tags=driver_tags(run.config.storage),
        run_config=QUIET,
        raise_on_error=False,
    )


def _conclude(run: Run, result: dg.ExecuteInProcessResult, terminal: Terminal) -> int:
    """Print for a person what was made and how the run ended; returns the exit code."""
    out, err = terminal
    tell_what_was_made(run, terminal)
    if not run.store.made and result.success:
        out.write("everything was up to date: no teacher call, no training\n")
    failed = [check for check in result.get_asset_check_evaluations() if not check.passed]
    for check in failed:
        err.write(f"{check.metadata['message'].value}\n")
    if failed:
        return UNUSABLE if any(check.check_name == SURVIVAL_CHECK for check in failed) else BROKEN_INVARIANT
    if not result.success:
        for event in result.get_step_failure_events():
            err.write(f"{event.step_key}: {root_cause(event.step_failure_data.error)}\n")
        return FAILED
    if waiting := run.staleness.waiting_rows():
        out.write(f"{waiting} new rows wait for more before a student is trained on them: release.retrain_after_rows\n")
    # A run of selected assets may leave the report of an earlier run, which says nothing about this one.
    report = None if run.staleness.is_stale(REPORT, None) else run.store.manifest(REPORT)
    if report is not None and report.value is not None:
        conclusion = report.value["figures"].get("conclusion")
        out.write(f"{conclusion['gained']}\n" if conclusion else "")
        out.write(f"report: {report.value['html']}\n")
    return DONE
