"""The errors that end a training for good. Curves on real workers are in test_train.py."""

import gc
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from operators.train import loop
from operators.train.config import TrainConfig
from operators.train.export import ExportError
from operators.train.job import FAILED, TrainJob
from operators.train.loop import _best_checkpoint, read_failure, train_worker, would_repeat
from operators.train.lora import LoraConfig
from operators.train.pack_order import read_index
from operators.train.trainer import NotFiniteError, Trainer
from operators.train.validation import Evaluated, History

CONFIG = TrainConfig(max_steps=3, examples_per_step=9, learning_rate=1e-3, precision="fp32", threads_per_worker=1)


@pytest.fixture(scope="module")
def job(tiny_model, packs_file, tmp_path_factory):
    digest = read_index([packs_file]).digest
    return TrainJob(CONFIG, tiny_model, str(tmp_path_factory.mktemp("loop")), [packs_file], digest, "identity")


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (NotFiniteError("nan"), True),
        (ExportError("disk"), True),
        (ValueError("wrong model"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ConnectionError("reset"), False),
        (OSError("stale file handle"), False),
    ],
)
def test_only_permanent_errors_end_a_run(error, repeats):
    assert would_repeat(error) is repeats


def test_where_the_best_weights_are_gone_the_last_are_exported_and_the_report_says_so(job, tmp_path):
    notes: list[str] = []
    history = History(0, [Evaluated(2, 1.0), Evaluated(4, 3.0)])
    assert _best_checkpoint(replace(job, folder=str(tmp_path)), history, 4, notes) is None
    assert notes == ["train: the best weights, of step 2, are gone; exported the last instead"]


def test_the_job_s_template_is_exported(job, monkeypatch):
    given = []

    def export(*arguments):
        given.append(arguments[-1])
        raise ExportError("enough")

    monkeypatch.setattr(loop, "export_student", export)
    for template in ("", "a template"):
        with pytest.raises(ExportError):
            loop._finish(replace(job, chat_template=template), None, None, [], None)
    assert given == ["", "a template"]


def test_a_permanent_failure_is_not_tried_again(job, tmp_path, monkeypatch):
    tried = []

    def fail(_):
        tried.append(1)
        raise NotFiniteError("train: loss at step 3 is nan")

    monkeypatch.setattr("operators.train.loop._train", fail)
    here = replace(job, folder=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(NotFiniteError):
        train_worker({"job": here})
    train_worker({"job": here})  # as Ray Train would restart it
    assert tried == [1]
    assert read_failure(tmp_path) == "train: loss at step 3 is nan"
    (tmp_path / "checkpoints" / FAILED).unlink()
    with pytest.raises(NotFiniteError):
        train_worker({"job": here})


def bytes_of_tensors():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn if they are looked at
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("keys", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3, "lora": LoraConfig(r=2)}])
@pytest.mark.usefixtures("process_group")
def test_the_best_weights_are_loaded_after_the_memory_of_the_last_is_freed(job, tmp_path, monkeypatch, keys):
    before, during, losses, exported = [], [], iter([1.0, 2.0]), []
    load = loop.loaded

    @contextmanager
    def watched(*arguments):
        before.append(bytes_of_tensors())
        with load(*arguments) as (engine, noise):
            yield engine, noise
            during.append(bytes_of_tensors())
            del engine, noise

    monkeypatch.setattr(loop, "loaded", watched)
    monkeypatch.setattr(Trainer, "evaluate", lambda _: {"validation_loss": next(losses), "quiet_loss": 1.0})
    monkeypatch.setattr(loop, "_finish", lambda *given: exported.append(given[-1]))
    config = CONFIG.model_copy(update={"max_steps": 2, "evaluate_every_steps": 1, **keys})
    loop._train(replace(job, folder=str(tmp_path), config=config))
    assert during[0] - before[0] > 12e6, "the embedding alone has 12.6 MB"
    assert before[1] - before[0] < 1e6
    assert exported == [1]
