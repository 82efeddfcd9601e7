"""Decides what is stale: describes as plain JSON what each asset is made from, and compares that with its manifest.

If both descriptions are equal, the asset need not be made again. Absolute paths are left out: a file is identified by
its name below `source.path` and by its content, so an uploaded copy of the working directory has the same data. Models
are named by their paths, and by samples of their content: other weights at the same path make an asset stale.
"""

from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from typing import Any

from cluster.manifest import Description, Manifest, fingerprint_of
from cluster.storage import AssetStore
from flows.config import RunConfig
from flows.graph import (
    CONFIG_KEYS,
    EVALUATION,
    ONLY_ROWS,
    PACKED_SEQUENCES,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    Specs,
)
from flows.graph import HELD_OUT as HELD_OUT_ROWS
from flows.refresh_requests import Requests
from flows.retractions import Retractions
from flows.source_versions import source_files
from flows.taken_files import TAKEN_OUT, TakenFiles
from operators.columns import HELD_OUT, RECYCLED_OUTCOMES
from operators.models import quick_revision
from operators.stage import StageConfig
from operators.teacher.variants import every_teacher

RETRIES = "failed_calls_made_again"  # key of a description: how often
MODELS = "models"  # key of a description: section of the configuration -> what identifies its models


class Staleness:
    """Describes any asset of a graph under one configuration, given the assets in the store."""

    def __init__(
        self,
        config: RunConfig,
        specs: Specs,
        store: AssetStore,
        settle_s: float = 0,
        requests: Requests | None = None,
        retractions: Retractions | None = None,
    ) -> None:
        """Use a storage; source files younger than `settle_s` seconds are ignored, files of requests count as taken."""
        self._config = config
        self._specs = specs
        self._store = store
        self.files = TakenFiles(config.source, store, settle_s, requests, retractions)

    def describe(self, asset: str, refresh: str | None, planned: str | None = None) -> Description:
        """Code version, configuration and inputs of an asset; see the module.

        New refreshes that are too small to train on again (`release.retrain_after_rows`, `.retrain_after_share`) are
        left out as long as nothing else has changed.

        Args:
            asset: its name.
            refresh: its key; None if it is made over all refreshes.
            planned: a refresh that will be made; its assets, and those over all refreshes, are described as they will
                be. Without it, inputs are described as they are, since an asset is made from existing inputs.
        """
        with self._store.looking():
            return self._described(asset, refresh, planned)

    def _described(self, asset: str, refresh: str | None, planned: str | None) -> Description:
        described = self._describe(asset, refresh, planned)
        models = {name: self._revisions[name] for name in described["config"] if name in self._revisions}
        now = described | ({MODELS: models} if models else {})
        manifest = self._store.manifest(asset, refresh)
        if manifest is None:
            return now
        # What is not known on this machine, or was not written down by an older version, has not changed.
        then = {name: models.get(name, revision) for name, revision in manifest.made_from.get(MODELS, {}).items()}
        same = described | ({MODELS: then} if then else {})
        if fingerprint_of(same) == manifest.fingerprint:
            return same
        return manifest.made_from if self._waits_for_rows(asset, same, manifest) else now

    def _waits_for_rows(self, asset: str, described: Description, manifest: Manifest) -> bool:
        """Whether only new refreshes make the asset stale, and they are too small to train on again."""
        if asset not in (PACKED_SEQUENCES, EVALUATION):
            return False
        new = set(described["inputs"]) - set(manifest.made_from["inputs"])
        before = {name: made for name, made in described["inputs"].items() if name not in new}
        if not new or fingerprint_of(described | {"inputs": before}) != manifest.fingerprint:
            return False
        return not self._are_worth_training(asset, new, before)

    @cached_property
    def _revisions(self) -> dict[str, str]:
        """What identifies the models of a section of the configuration, of those that are on this machine."""
        config, teachers = self._config, every_teacher(self._config.teacher)
        models = {
            "student": {config.student.model},
            "teacher": {teacher.model for _, teacher in teachers if teacher.backend == "vllm"},
            "select": {config.select.reward_model} - {""} if config.select.policy == "reward" else set(),
        }
        found = {name: [quick_revision(model) for model in sorted(named)] for name, named in models.items()}
        return {name: " ".join(revisions) for name, revisions in found.items() if revisions and all(revisions)}

    def waiting_rows(self) -> int:
        """Number of recycled rows that wait for more rows before a student is trained on them."""
        trained = self._store.manifest(PACKED_SEQUENCES)
        if trained is None:
            return 0
        keys = self._store.refreshes(RECYCLED_INSTRUCTIONS)
        new = [key for key in keys if f"{RECYCLED_INSTRUCTIONS}[{key}]" not in trained.made_from["inputs"]]
        return sum(self._num_recycled(key) or 0 for key in new)

    def _are_worth_training(self, asset: str, new: Collection[str], before: Collection[str]) -> bool:
        limits = self._config.release
        if not limits.retrain_after_rows and not limits.retrain_after_share:
            return True
        if asset == EVALUATION:  # more held-out rows are no reason to evaluate the same student again
            return False
        counts = [self._num_recycled(refresh_of(name)) for name in new]
        if None in counts:  # a planned refresh that is not made yet
            return True
        rows, trained = sum(filter(None, counts)), sum(self._num_recycled(refresh_of(name)) or 0 for name in before)
        enough = bool(limits.retrain_after_rows) and rows >= limits.retrain_after_rows
        return enough or (bool(limits.retrain_after_share) and rows >= limits.retrain_after_share * trained)

    def _num_recycled(self, refresh: str) -> int | None:
        manifest = self._store.manifest(RECYCLED_INSTRUCTIONS, refresh)
        return None if manifest is None else sum(manifest.outcomes.get(outcome, 0) for outcome in RECYCLED_OUTCOMES)

    def _describe(self, asset: str, refresh: str | None, planned: str | None) -> Description:
        spec = self._specs[asset]
        sections = {name: _identity_of(getattr(self._config, name)) for name in spec.metadata.get(CONFIG_KEYS, [])}
        described: Description = {"code": spec.code_version, "config": sections, "inputs": {}}
        if asset == RAW_INSTRUCTIONS:
            described["files"] = [list(version) for version in self.files.described(refresh)]
            described |= self._taken_out(refresh) | self._earlier(refresh)
        if asset == PACKED_SEQUENCES and self._config.pack.mixture.general:
            described["general"] = self._general()
            described["decontaminate"] = _identity_of(self._config.decontaminate)
        described |= self._retries(asset, refresh)
        for parent in sorted(dep.asset_key.to_user_string() for dep in spec.deps):
            described["inputs"] |= self._input(asset, parent, refresh, planned)
        return described

    def _general(self) -> list[list[str]]:
        """The files of general data by name and content; none if they are not there, which the preflight refuses."""
        with suppress(ValueError):
            return [[file.name, file.identity] for file in source_files(self._config.pack.mixture.general)]
        return []

    def fingerprint(self, asset: str, refresh: str | None = None, planned: str | None = None) -> str:
        """The fingerprint that the asset would have if it were made now."""
        return fingerprint_of(self.describe(asset, refresh, planned))

    def is_stale(self, asset: str, refresh: str | None, planned: str | None = None) -> bool:
        """Whether the asset is missing, or would be made from something else now."""
        with self._store.looking():
            manifest = self._store.manifest(asset, refresh)
            return manifest is None or manifest.fingerprint != self.fingerprint(asset, refresh, planned)

    def _taken_out(self, refresh: str | None) -> dict[str, list[list[str]]]:
        """The retracted files that the refresh once held; a refresh without rows is no error if it has such files."""
        out = [list(version) for version in self.files.taken_out(refresh)]
        return {TAKEN_OUT: out} if out else {}

    def _earlier(self, refresh: str | None) -> dict[str, str]:
        """A hash over all earlier refreshes, because they decide which rows were seen before."""
        before = {key: self._fingerprint_made(RAW_INSTRUCTIONS, key) for key in self.files.earlier(refresh)}
        return {"earlier": fingerprint_of({"refreshes": list(before.items())})} if before else {}

    def _retries(self, asset: str, refresh: str | None) -> Description:
        """How often the asset was made again because of failed teacher calls, plus one if some can be retried now.

        So failed calls that can be retried make the asset stale.
        """
        manifest = self._store.manifest(asset, refresh)
        if manifest is None:
            return {}
        again = bool(manifest.metrics.get("retryable_calls"))
        times = manifest.made_from.get(RETRIES, 0) + again
        return {RETRIES: times} if times else {}

    def _input(self, asset: str, parent: str, refresh: str | None, planned: str | None) -> dict[str, str]:
        if self._specs[parent].partitions_def is None:
            return {parent: self._fingerprint_of_input(parent, None, planned)}
        if refresh is not None:
            return {parent: self._fingerprint_of_input(parent, refresh, planned)}
        # An asset over all refreshes reads every finished refresh as it is, whatever configuration made it.
        keys = self._store.refreshes(parent)
        keys += [planned] if planned is not None and planned not in keys else []
        if self._specs[asset].metadata.get(ONLY_ROWS):
            keys = [key for key in keys if has_usable_rows(self._store.manifest(parent, key), parent)]
        return {f"{parent}[{key}]": self._fingerprint_of_input(parent, key, planned) for key in keys}

    def _fingerprint_of_input(self, parent: str, refresh: str | None, planned: str | None) -> str:
        if planned is not None and refresh in (None, planned):
            return self.fingerprint(parent, refresh, planned)
        return self._fingerprint_made(parent, refresh)

    def _fingerprint_made(self, asset: str, refresh: str | None) -> str:
        manifest = self._store.manifest(asset, refresh)
        return self.fingerprint(asset, refresh) if manifest is None else manifest.fingerprint


def refresh_of(name: str) -> str:
    """The key in the name of an input, such as `recycled_instructions[2026-11-26]`."""
    return name.partition("[")[2].removesuffix("]")


def has_usable_rows(manifest: Manifest | None, asset: str) -> bool:
    """Whether a refresh has rows to evaluate on (for `held_out`) or to train on (for others); True if not made yet."""
    usable = (HELD_OUT,) if asset == HELD_OUT_ROWS else RECYCLED_OUTCOMES
    return manifest is None or any(manifest.outcomes.get(outcome) for outcome in usable)


def differences(before: Description, now: Description, prefix: str = "") -> list[str]:
    """Name what changed: `config.train.max_steps 8 -> 12`, `inputs.raw_instructions changed`."""
    reasons = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            reasons += differences(old, new, f"{name}.")
        elif prefix == "inputs." or key == "files":
            reasons.append(f"{name} changed")
        elif key == TAKEN_OUT:
            reasons.append("files were retracted")
        elif key == "earlier":
            reasons.append("an earlier refresh changed")
        elif key == RETRIES:
            reasons.append("teacher calls that failed can be made again")
        else:
            reasons.append(f"{name} {old} -> {new}")
    return reasons


def _identity_of(section: StageConfig | str) -> dict[str, Any] | str:
    return section if isinstance(section, str) else section.identity()
