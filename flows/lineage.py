"""Describes exactly what a published data set was made from."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.manifest import Manifest
from flows.graph import RAW_INSTRUCTIONS, RECYCLED_INSTRUCTIONS
from flows.run import Run
from operators.models import model_revision
from operators.reflect.reflect_instructions import ABOUT as INSTRUCTIONS
from operators.reflect.reflect_responses import ABOUT as RESPONSES

VERSION = "0.1.0"  # of the project: pyproject.toml reads it here, since uploaded code has no package metadata
REFLECTIONS = (INSTRUCTIONS, RESPONSES)
# Sections of the configuration that shape rows.
SHAPING = ("source", "deduplicate", "decontaminate", "steps", "reflect", "filter", "select", "score")


def lineage_of(run: Run) -> dict[str, Any]:
    """Source files with their hashes, prompts, models, configuration, and the rows by outcome, of all refreshes."""
    config = run.config
    refreshes = run.store.refreshes(RECYCLED_INSTRUCTIONS)
    manifests = _manifests(run, RECYCLED_INSTRUCTIONS, refreshes)
    sources = _manifests(run, RAW_INSTRUCTIONS, refreshes)
    outcomes: Counter[str] = Counter()
    for manifest in manifests.values():
        outcomes.update(manifest.outcomes)
    teacher, texts = config.teacher, ("<row>", "<instruction>", "<input>", "<response>")
    prompts = {about.stage: about.prompter(config.reflect).content(*texts) for about in REFLECTIONS}
    revision = model_revision(run.teacher.model) if teacher.backend == "vllm" else ""
    return {
        "version": VERSION,
        "source": {"files": [file for source in sources.values() for file in source.made_from.get("files", [])]},
        "refreshes": {key: manifest.fingerprint for key, manifest in manifests.items()},
        "code": {asset: spec.code_version for asset, spec in run.specs.items()},
        "teacher": {**teacher.identity(), "revision": revision},
        "student": {"model": config.student.model, "revision": run.student_revision},
        "prompts": {
            stage: {"sha256": hashlib.sha256(prompt.encode()).hexdigest(), "text": prompt}
            for stage, prompt in prompts.items()
        },
        "configuration": {name: getattr(config, name).identity() for name in SHAPING},
        "outcomes": dict(outcomes.most_common()),
    }


def _manifests(run: Run, asset: str, refreshes: Sequence[str]) -> dict[str, Manifest]:
    found = {key: run.store.manifest(asset, key) for key in refreshes}
    return {key: manifest for key, manifest in found.items() if manifest is not None}
