"""Training on real Ray Train and DeepSpeed workers with gloo, except for what needs no worker."""

import json
import math
import os
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators import columns
from operators.encode import encode_example, load_tokenizer
from operators.pack import Document, _to_table, best_fit_decreasing
from operators.train import MANIFEST, TrainConfig, train
from operators.train_loop import load_student, read_metrics, summed_loss
from operators.train_plan import PackStore

CONFIG = TrainConfig(
    num_workers=1,
    max_steps=4,
    packs_per_step=5,
    learning_rate=1e-3,
    precision="fp32",
    max_failures=0,
    checkpoint_every_steps=0,
    cpus_per_worker=0.5,
    threads_per_worker=1,
)


def write_packs(path, student, examples=24, max_tokens=160):
    """Packs of small examples; the order of documents is that of their ids."""
    tokenizer = load_tokenizer(student)
    texts = [
        (f"Count from {n} to {n + 3}.", "", " ".join(str(n + k) for k in range(4 + n % 5))) for n in range(examples)
    ]
    documents = [Document(f"r{n:03d}", encode_example(tokenizer, *text)) for n, text in enumerate(texts)]
    table = _to_table(best_fit_decreasing(documents, max_tokens), [("bad", "quarantined:too_long")])
    pq.write_table(table, path)
    return str(path)


@pytest.fixture(scope="module")
def packs_file(tiny_model, tmp_path_factory):
    return write_packs(tmp_path_factory.mktemp("packs") / "packs.parquet", tiny_model)


@pytest.fixture
def packs(local_ray, packs_file):
    return ray.data.read_parquet(packs_file)


def run(packs, model, folder, **changes):
    return train(packs, CONFIG.model_copy(update=changes), model, str(folder))


@pytest.fixture(scope="module")
def alone(local_ray, packs_file, tiny_model, tmp_path_factory):
    """The curve that every other number of workers and every restart must reproduce: one worker, ZeRO-2."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(ray.data.read_parquet(packs_file), tiny_model, folder)


def test_packed_loss_is_the_sum_of_the_documents_alone(packs_file, tiny_model):
    model = load_student(tiny_model, CONFIG)
    store = PackStore([packs_file])
    pack = store.pack(0)
    assert len(pack.document_lengths) > 1
    alone, start = 0.0, 0
    for length in pack.document_lengths:
        span = slice(start, start + length)
        tokens, labels = torch.tensor([pack.input_ids[span]]), torch.tensor([pack.labels[span]])
        alone += model(input_ids=tokens, labels=labels).loss.item() * int((labels != -100).sum())
        start += length
    assert summed_loss(model, pack).item() == pytest.approx(alone, rel=1e-5)


def test_packed_logits_are_those_of_the_documents_alone(packs_file, tiny_model):
    model = load_student(tiny_model, CONFIG)
    pack = PackStore([packs_file]).pack(0)
    positions = torch.cat([torch.arange(length) for length in pack.document_lengths])[None]
    tokens = torch.tensor([pack.input_ids])
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.split(pack.document_lengths, 1)
    for part, document in zip(packed, tokens.split(pack.document_lengths, 1), strict=True):
        torch.testing.assert_close(part, model(input_ids=document).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_manifest_and_metrics_agree(alone):
    folder, manifest = alone
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(4))
    assert manifest["losses"] == [line["loss"] for line in lines]
    assert manifest["last_loss"] < manifest["first_loss"]
    assert manifest["first_loss"] == pytest.approx(math.log(49152), rel=0.05)  # random weights know nothing
    assert manifest["neft_l2"] == pytest.approx(5 / math.sqrt(3), rel=0.1)
    assert manifest["supervised_tokens"] < manifest["tokens"]
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(2, 2), (2, 3), (1, 3), (2, 0), (2, 1)])
def test_the_curve_is_the_same_for_any_number_of_workers_and_stage(alone, packs, tiny_model, tmp_path, workers, stage):
    manifest = run(packs, tiny_model, tmp_path, num_workers=workers, zero_stage=stage)
    assert manifest["losses"] == pytest.approx(alone[1]["losses"], rel=1e-5)
    assert manifest["grad_norms"] == pytest.approx(alone[1]["grad_norms"], rel=1e-4)
    assert manifest["neft_l2"] == pytest.approx(alone[1]["neft_l2"], rel=1e-6)
    one, many = (AutoModelForCausalLM.from_pretrained(folder) for folder in (alone[0], tmp_path))
    for (name, expected), (_, got) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
