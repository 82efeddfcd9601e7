"""The lineage of a published data set is known even if the code was uploaded and never installed."""

import hashlib
import importlib.metadata
import json
from pathlib import Path

import pytest

from cluster.runtime import REPOSITORY
from flows.config import load_config
from flows.lineage import VERSION, lineage_of
from flows.recycle_and_train import GRAPH
from flows.run import open_run


def test_it_names_version_models_and_prompts_word_for_word(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    settings = [f"storage={tmp_path}", f"student.model={tiny_model}", "decontaminate.files=[s3://me:SECRET1@b/x.json]"]
    settings += ["source.path=s3://me:SECRET2@b/data?token=SECRET3", "teacher.base_url=http://me:SECRET4@host/v1"]
    settings += [
        "teacher.extra_body={api_key: SECRET5}",
        "teacher.stages={judge: {extra_body: {auth: {token: SECRET6}}}}",
    ]
    run = open_run(load_config(REPOSITORY / "configs" / "smoke.yaml", settings), GRAPH.specs)
    lineage = lineage_of(run)
    assert lineage["version"] == VERSION
    assert "SECRET" not in json.dumps(lineage)
    assert "b/x.json" in json.dumps(lineage)
    assert lineage["student"]["model"] == tiny_model
    assert lineage["prompts"].keys() == {"reflect_instructions", "reflect_responses"}
    assert "steps" in lineage["configuration"]
    for prompt in lineage["prompts"].values():
        assert prompt["sha256"] == hashlib.sha256(prompt["text"].encode()).hexdigest()
        assert "<instruction>" in prompt["text"]
