"""The student as its worker loads it, and the process around it."""

import sys
from importlib import import_module

import pytest
import torch

from kernels.neftune import batch_of_pack
from operators.train.config import TrainConfig
from operators.train.engine import _hidden, load_student, loaded, prepare_process


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_student_has_the_precision_of_the_configuration_and_learns(tiny_model, precision, dtype):
    model = load_student(tiny_model, TrainConfig(precision=precision, activation_checkpointing=True))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.training
    assert model.is_gradient_checkpointing
    assert not load_student(tiny_model, TrainConfig(precision=precision)).is_gradient_checkpointing


def test_a_process_takes_the_threads_of_the_configuration(process_group):
    before = torch.get_num_threads()
    try:
        prepare_process(TrainConfig(threads_per_worker=2))
        assert torch.get_num_threads() == 2
        prepare_process(TrainConfig(threads_per_worker=0))
        assert torch.get_num_threads() == 2, "0 leaves the number as it is"
    finally:
        torch.set_num_threads(before)


def test_a_package_is_hidden_from_imports_and_found_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with _hidden("colorsys"), pytest.raises(ImportError):
        import_module("colorsys")
    used = import_module("colorsys")
    with _hidden("colorsys"):
        assert import_module("colorsys") is used, "what is in use is not taken away"


def test_noise_is_on_the_embedding_of_the_engine_in_training_only(job):
    with loaded(job) as (engine, noise):
        embedding = engine.module.get_input_embeddings()
        ids = torch.randint(100, 40_000, (1, 64))
        noise.set_batch(batch_of_pack([40, 20], [1, 2], 64, epoch=0))
        noisy = embedding(ids)
        assert noise.l2_per_document().tolist() == pytest.approx([job.config.neftune_alpha / 3**0.5] * 2, rel=0.1)
        engine.module.eval()
        assert not torch.equal(embedding(ids), noisy)
        assert torch.equal(embedding(ids), embedding(ids))
