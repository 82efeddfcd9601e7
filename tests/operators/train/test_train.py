"""Training on real DeepSpeed workers with gloo. Ray Train starts them in tests of starts, deaths and restarts."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train import TrainingFailedError
from transformers import AutoModelForCausalLM

from operators.student.packed_loss import summed_loss
from operators.train.engine import load_student
from operators.train.metrics import read_metrics
from operators.train.pack_order import PackStore
from operators.train.train import MANIFEST, TrainConfig, TrainResult, train
from tests.operators.train.elastic import MANY_STEPS
from tests.operators.train.standing_workers import start_workers, trainer_of

CONFIG = TrainConfig(
    num_workers=1,
    max_steps=8,
    packs_per_step=5,
    learning_rate=1e-3,
    precision="fp32",
    max_failures=0,
    checkpoint_every_steps=0,
    cpus_per_worker=0.5,
    threads_per_worker=1,
)


@pytest.fixture
def packs(local_ray, packs_file):
    return ray.data.read_parquet(packs_file)


def run(packs, model, folder, trainer=None, **changes):
    """Run `train` with Ray Train, or with its replacement `trainer`."""
    with pytest.MonkeyPatch.context() as patch:
        if trainer is not None:
            patch.setattr("operators.train.train.TorchTrainer", trainer)
        return train(packs, CONFIG.model_copy(update=changes), model, str(folder))


@pytest.fixture(scope="module")
def here(process_group):
    """One worker, in this process."""
    return trainer_of([])


@pytest.fixture(scope="module")
def two(local_ray, tmp_path_factory):
    """Two workers that are shared by all tests that are not about starting them."""
    workers = start_workers(2, str(tmp_path_factory.mktemp("two") / "meeting"))
    yield trainer_of(workers)
    for worker in workers:
        ray.kill(worker)


@pytest.fixture(scope="module")
def alone(local_ray, here, packs_file, tiny_model, tmp_path_factory):
    """The curve that every other number of workers and every restart must reproduce: one worker, ZeRO-2."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(ray.data.read_parquet(packs_file), tiny_model, folder, here)


def test_a_template_reaches_the_workers_and_makes_another_student(packs, tiny_model, tmp_path):
    jobs = []

    def trainer(_, train_loop_config, **__):
        jobs.append(train_loop_config["job"])
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("operators.train.train.TorchTrainer", trainer)
        for template in ("", "one", "two"):
            with pytest.raises(InterruptedError):
                train(packs, CONFIG, tiny_model, str(tmp_path / template), template)
    assert [job.chat_template for job in jobs] == ["", "one", "two"]
    assert len({job.identity for job in jobs}) == 3
    assert jobs[0].identity == CONFIG.run_identity(jobs[0].digest, tiny_model)


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
    assert [line["step"] for line in lines] == list(range(8))
    assert manifest.losses == [line["loss"] for line in lines]
    assert manifest.last_loss < manifest.first_loss
    assert manifest.first_loss == pytest.approx(math.log(49152), rel=0.05)  # random weights know nothing
    assert manifest.neft_l2 == pytest.approx(5 / math.sqrt(3), rel=0.1)
    assert manifest.supervised_tokens < manifest.tokens
    assert TrainResult.model_validate_json((folder / MANIFEST).read_text()) == manifest
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3, 0, 1])
def test_the_curve_is_the_same_for_any_number_of_workers_and_stage(alone, two, packs, tiny_model, tmp_path, stage):
    manifest = run(packs, tiny_model, tmp_path, two, num_workers=2, zero_stage=stage)
    assert len(manifest.peak_rss_bytes) == 2
    assert manifest.losses == pytest.approx(alone[1].losses, rel=1e-5)
    assert manifest.grad_norms == pytest.approx(alone[1].grad_norms, rel=1e-4)
    assert manifest.neft_l2 == pytest.approx(alone[1].neft_l2, rel=1e-6)
    one, many = (AutoModelForCausalLM.from_pretrained(folder) for folder in (alone[0], tmp_path))
    for (name, expected), (_, got) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_muon_gives_the_same_curve_on_two_workers(here, two, packs, tiny_model, tmp_path):
    muon = {"optimizer": "muon", "max_steps": 3}
    one = run(packs, tiny_model, tmp_path / "one", here, **muon)
    assert run(packs, tiny_model, tmp_path / "two", two, num_workers=2, **muon).losses == pytest.approx(
        one.losses, rel=1e-5
    )


@contextmanager
def killed_after(folder, *steps):
    """SIGKILL rank 0 from outside as soon as its metrics show each step; yield the list of killed pids."""
    killed, leave = [], threading.Event()

    def watch():
        for step in steps:
            while not leave.wait(0.005):
                lines = read_metrics(folder / "metrics.jsonl")
                if lines and lines[-1]["step"] >= step and lines[-1]["pid"] not in killed:
                    os.kill(lines[-1]["pid"], signal.SIGKILL)
                    killed.append(lines[-1]["pid"])
                    break

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        leave.set()
        watcher.join()


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_a_run_that_died_goes_on_with_another_number(
    alone, here, packs, tiny_model, tmp_path
):
    """Workers of Ray Train are killed twice, of which it handles one; then another run continues with one worker.

    When the metrics show step 4, the save after it has begun, and so the one two steps before is complete.
    """
    settings = {"zero_stage": 3, "checkpoint_every_steps": 2, "max_failures": 1}
    with killed_after(tmp_path, 4, 6) as killed, pytest.raises(TrainingFailedError):
        run(packs, tiny_model, tmp_path, num_workers=2, **settings)
    died = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in died] == list(range(len(died)))
    assert died[1]["pid"] == killed[0], "what was measured before the last checkpoint is kept"
    assert died[-1]["pid"] == killed[1] != killed[0], "other workers went on"
    manifest = run(packs, tiny_model, tmp_path, here, num_workers=1, **settings)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[:4] == died[:4]  # kept, not measured again
    assert lines[-1]["pid"] == os.getpid()
    assert "with 1 workers, after 2 before" in manifest.notes[0]
    assert not list(tmp_path.rglob("universal-*"))
    assert manifest.losses == pytest.approx(alone[1].losses, rel=1e-5)


@pytest.mark.slow
def test_one_worker_continues_a_zero_2_checkpoint_of_two_workers(alone, two, packs, tiny_model, tmp_path):
    settings = {"zero_stage": 2, "checkpoint_every_steps": 2}

    def stopped_at_once(loop, train_loop_config, **rest):
        stop = tmp_path / "checkpoints" / "stop"
        stop.touch()
        two(loop, train_loop_config, **rest).fit()
        stop.unlink()
        here = trainer_of([])
        one = replace(train_loop_config["job"], config=CONFIG.model_copy(update=settings))
        return here(loop, {"job": one}, SimpleNamespace(num_workers=1))

    manifest = run(packs, tiny_model, tmp_path, stopped_at_once, num_workers=2, **settings)
    assert manifest.notes[0] == "went on at step 1 with 1 workers, after 2 before"
    assert len(manifest.peak_rss_bytes) == 1
    assert manifest.losses == pytest.approx(alone[1].losses, rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_trains_nothing_whatever_the_resources(alone, packs, tiny_model):
    folder, manifest = alone
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert run(packs, tiny_model, folder, num_workers=2, zero_stage=3) == manifest
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_finished_folder_is_not_overwritten_by_another_run(alone, packs, tiny_model):
    with pytest.raises(ValueError, match="finished student of other packs or another configuration"):
        run(packs, tiny_model, alone[0], neftune_alpha=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_without_noise_in_bf16_with_recomputation(alone, two, packs, tiny_model, tmp_path, stage):
    changes = {"neftune_alpha": 0, "precision": "bf16", "activation_checkpointing": True, "num_workers": 2}
    manifest = run(packs, tiny_model, tmp_path, two, max_steps=2, zero_stage=stage, **changes)
    assert manifest.neft_l2 is None
    assert manifest.first_loss == pytest.approx(alone[1].first_loss, rel=1e-2)
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path).parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_demo_model_learns_on_two_workers(two, packs, demo_model, tmp_path):
    manifest = run(packs, demo_model, tmp_path, two, num_workers=2, max_steps=2, packs_per_step=2, learning_rate=2e-5)
    assert manifest.last_loss < manifest.first_loss < 4  # a trained model, not a random one
    assert len(manifest.peak_rss_bytes) == 2
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert exported.config.tie_word_embeddings


def run_script(name, *arguments):
    """Run a script of this folder that starts a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as short:  # sockets lie there
        home = {"RAY_TMPDIR": short, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | home
        command = [sys.executable, Path(__file__).with_name(name), *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=400)
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.long
def test_an_elastic_training_goes_on_with_fewer_workers_after_a_node_was_lost(alone, packs_file, tiny_model, tmp_path):
    run_script("elastic.py", tmp_path, packs_file, tiny_model)
    result = TrainResult.model_validate_json((tmp_path / "result.json").read_text())
    assert result.num_workers == 1
    assert any("with 1 workers, after 2 before" in note for note in result.notes)
    assert result.losses == pytest.approx(alone[1].losses, rel=1e-5)
    pids = [line["pid"] for line in read_metrics(tmp_path / "student" / "metrics.jsonl")]
    assert pids[0] != pids[-1], "the node was lost only after the training"


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_is_drained_leaves_a_checkpoint_with_which_the_others_go_on(packs_file, tiny_model, tmp_path):
    run_script("elastic.py", tmp_path, packs_file, tiny_model, "drained")
    result = TrainResult.model_validate_json((tmp_path / "result.json").read_text())
    [went_on] = [note for note in result.notes if "with 1 workers, after 2 before" in note]
    lines = read_metrics(tmp_path / "student" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(MANY_STEPS))
    first = next(line["step"] for line in lines if line["pid"] == lines[-1]["pid"])
    assert f"at step {first} " in went_on
    assert first > 3, "it began anew at its beginning"


@pytest.mark.slow
@pytest.mark.long
def test_two_runs_that_want_two_of_three_nodes_each_both_end_and_none_holds_half_of_its_workers(tmp_path):
    run_script("gangs.py", tmp_path)
    a, b = ([json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in "ab")
    assert all(len({worker["node"] for worker in run}) == 2 for run in (a, b))
    first, second = sorted((a, b), key=lambda run: run[0]["began"])
    assert max(worker["ended"] for worker in first) <= min(worker["began"] for worker in second)
