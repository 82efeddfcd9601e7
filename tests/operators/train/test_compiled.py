"""Compiled layers train like others. Here the graphs are only traced and not turned into machine code."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from operators.train.compiled import compile_layers
from operators.train.engine import loaded
from operators.train.pack_order import PackStore
from operators.train.trainer import Trainer


def curve(job):
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        return [step.loss for step in (trainer.step(0), trainer.step(1))]


def test_compiled_layers_give_the_same_curve(job, monkeypatch):
    plain = replace(job, config=job.config.model_copy(update={"zero_stage": 2}))
    losses, graphs = curve(plain), []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("operators.train.engine.compile_layers", lambda model: compile_layers(model, backend=traced))
    torch.compiler.reset()
    compiled = curve(replace(job, config=plain.config.model_copy(update={"compile": True, "packs_per_pass": 2})))
    assert compiled == pytest.approx(losses, rel=1e-6)
    assert 0 < len(graphs) <= 6, "one set of graphs serves every layer and length"


def test_a_model_that_does_not_name_its_layers_is_refused():
    with pytest.raises(ValueError, match=r"train\.compile: Linear does not name its layers"):
        compile_layers(nn.Linear(2, 2))
