"""Prometheus metrics of a storage, on 127.0.0.1: `recycle-and-train metrics STORAGE [--port 9105]`, until Ctrl-C.

Each request reads them from the manifests, requests and releases, so they are also right if no run is active. Numbers
of a run while it works (rows, tokens and queue of each stage) are in Ray's own metrics, as `ray_recycle_stage_*`.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pyarrow import fs

from cluster.bundles import FOLDER as BUNDLES
from cluster.files import StorageError
from cluster.lease import is_leased
from cluster.manifest import MANIFEST
from cluster.storage import AssetStore
from flows.exit_codes import DONE, UNUSABLE
from flows.graph import (
    EVALUATION,
    HELD_OUT,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    STAGES,
)
from flows.refresh_requests import Requests
from flows.releases import existing_storage
from operators.columns import ACTIVE
from operators.evaluate.release_history import ReleaseHistory
from operators.files.atomic import open_filesystem

PORT = 9105
COUNTED = (RAW_INSTRUCTIONS, HELD_OUT, RECYCLED_INSTRUCTIONS)
CALLS = {"calls": "made", "cached_calls": "from_ledger", "failed_calls": "failed"}
TOKENS = {"prompt_tokens": "prompt", "generated_tokens": "generated"}


def serve_metrics(argv: Sequence[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Serve until Ctrl-C; returns 0, or 2 if the storage or the port cannot be used."""
    parser = argparse.ArgumentParser(prog="recycle-and-train metrics", description="Serve a storage's metrics.")
    parser.add_argument("storage", help="folder or URI of the runs' storage")
    parser.add_argument("--port", type=int, default=PORT, help="of 127.0.0.1 (%(default)s)")
    arguments = parser.parse_args(argv)
    registry = CollectorRegistry()
    try:
        registry.register(StorageMetrics(existing_storage(arguments.storage), err))
        server, _ = start_http_server(arguments.port, addr="127.0.0.1", registry=registry)
    except (ValueError, OSError, OverflowError) as error:  # the last is a port over 65535
        err.write(f"{error}\n")
        return UNUSABLE
    out.write(f"metrics: http://127.0.0.1:{arguments.port}/metrics\n")
    out.flush()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.shutdown()
    return DONE


class StorageMetrics(Collector):
    """Reads the storage whenever Prometheus asks; a part that cannot be read is counted, and the others are served."""

    def __init__(self, storage: str, err: TextIO = sys.stderr) -> None:
        """Serve the storage at an absolute path or URI; errors of reading are written to `err` when they change."""
        self._storage = storage
        self._err = err
        self._told: list[str] = []
        self._store = AssetStore(storage)

    def describe(self) -> list[Metric]:
        """Return no metrics: Prometheus calls this when it registers, which must not read the storage."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics; docs/operations.md explains the names."""
        parts: list[Callable[[], list[Metric]]] = [self._rows, self._teacher, self._refreshes, self._releases]
        broken: list[str] = []
        for part in parts:
            try:
                yield from part()
            except (StorageError, ValueError, OSError) as error:
                broken.append(str(error))
        if broken != self._told:
            self._err.writelines(f"metrics: {text}\n" for text in broken)
            self._err.flush()
            self._told = broken
        text = "Parts of the storage that could not be read; the output of `recycle-and-train metrics` says why."
        yield _gauge("recycle_unreadable_parts", text, len(broken))

    def _rows(self) -> list[Metric]:
        found = GaugeMetricFamily("recycle_rows", "Rows of all refreshes.", labels=["asset", "outcome"])
        for asset in COUNTED:
            outcomes: Counter[str] = Counter()
            for key in self._store.refreshes(asset):
                manifest = self._store.manifest(asset, key)
                outcomes.update(manifest.outcomes if manifest is not None else {})
            for outcome, count in sorted(outcomes.items()):
                found.add_metric([asset, outcome if outcome != ACTIVE else "active"], count)
        return [found]

    def _teacher(self) -> list[Metric]:
        calls = GaugeMetricFamily(
            "recycle_teacher_calls", "Calls of the last run that made each refresh.", labels=["asset", "kind"]
        )
        tokens = GaugeMetricFamily("recycle_teacher_tokens", "Tokens of these calls.", labels=["asset", "kind"])
        cost = GaugeMetricFamily(
            "recycle_teacher_cost", "Cost of these calls, at the configured prices.", labels=["asset"]
        )
        for asset in STAGES:
            sums: Counter[str] = Counter()
            for key in self._store.refreshes(asset):
                manifest = self._store.manifest(asset, key)
                metrics = manifest.metrics if manifest is not None else {}
                sums.update({name: value for name, value in metrics.items() if not isinstance(value, dict)})
            for name, kind in CALLS.items():
                calls.add_metric([asset, kind], sums[name])
            for name, kind in TOKENS.items():
                tokens.add_metric([asset, kind], sums[name])
            cost.add_metric([asset], sums["cost"])
        return [calls, tokens, cost]

    def _refreshes(self) -> list[Metric]:
        begun = self._store.refreshes(RAW_INSTRUCTIONS)
        finished = self._store.refreshes(RECYCLED_INSTRUCTIONS)
        requests = Requests(self._storage).all()
        given_up = sum(request.given_up is not None for request in requests)
        states = GaugeMetricFamily("recycle_refreshes", "Refreshes by state.", labels=["state"])
        states.add_metric(["recycled"], len(finished))
        states.add_metric(["not_recycled"], len(set(begun) - set(finished)))
        states.add_metric(["asked_for"], len(requests) - given_up)
        states.add_metric(["given_up"], given_up)
        busy = _gauge("recycle_storage_busy", "1 while a run holds the storage.", is_leased(self._storage))
        made = self._newest(finished)
        if made is None:
            return [states, busy]
        age = _gauge("recycle_newest_refresh_age_seconds", "Since a refresh was last recycled.", time.time() - made)
        return [states, busy, age]

    def _newest(self, refreshes: Sequence[str]) -> float | None:
        """Unix time at which the newest of these refreshes was recycled; None if none was."""
        filesystem, _ = open_filesystem(self._storage)
        paths = [f"{self._store.folder(RECYCLED_INSTRUCTIONS, key)}/{MANIFEST}" for key in refreshes]
        infos = filesystem.get_file_info(paths)
        if refreshes:  # a refresh that was bundled was made shortly before its bundle
            folder = f"{self._store.folder(RECYCLED_INSTRUCTIONS, None)}/{BUNDLES}"
            infos += filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return max((info.mtime_ns / 1e9 for info in infos if info.type == fs.FileType.File), default=None)

    def _releases(self) -> list[Metric]:
        history = ReleaseHistory(self._storage)
        loss = GaugeMetricFamily("recycle_held_out_loss", "Of the last decision, nats per token.", labels=["model"])
        wins = GaugeMetricFamily("recycle_win_margin", "Of the last judged student against its base model.")
        decisions = GaugeMetricFamily("recycle_decisions", "Decisions about students.", labels=["event"])
        made = [decision for decision in history.decisions() if decision.event != "rolled_back"]
        for event, count in Counter(decision.event for decision in history.decisions()).items():
            decisions.add_metric([event], count)
        if made:
            for model in ("base", "student"):
                value = getattr(made[-1].held_out_loss, model)
                if value is not None:
                    loss.add_metric([model], value)
            margins = [one.judge.win_margin for one in made if one.judge is not None]
            known = [margin for margin in margins if margin is not None]
            if known:
                wins.add_metric([], known[-1])
        seconds = self._store.manifest(EVALUATION)
        took = _gauge("recycle_evaluation_seconds", "The last evaluation took.", seconds.seconds if seconds else 0.0)
        return [loss, wins, decisions, took]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
