"""Checkpoints, on one in-process worker with a real DeepSpeed engine."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from operators.student import chunked_loss
from operators.train import checkpoint, loop
from operators.train import trainer as trainer_module
from operators.train.checkpoint import (
    CheckpointSpec,
    complete_checkpoints,
    given_checkpoint,
    newest_good,
    require_continuable,
    write_json,
)
from operators.train.config import TrainConfig
from operators.train.engine import loaded
from operators.train.export import gathered_weights
from operators.train.job import TrainJob
from operators.train.metrics import read_metrics
from operators.train.pack_order import PackStore
from operators.train.saving import save_checkpoint
from operators.train.trainer import Trainer

SPEC = CheckpointSpec("identity", world_size=2, zero_stage=2)


def write_checkpoint(checkpoints, step, spec=SPEC):
    """A complete checkpoint of one file."""
    folder = checkpoints / f"step-{step:08d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "shard.pt").write_bytes(b"12345")
    digests = {"state/shard.pt": hashlib.sha256(b"12345").hexdigest()}
    content = {"step": step, "spec": asdict(spec), "files": {"state/shard.pt": 5}, "digests": digests}
    write_json(folder / "COMPLETE", content)
    return folder


def test_only_complete_checkpoints_count(tmp_path):
    write_checkpoint(tmp_path, 10)
    (write_checkpoint(tmp_path, 20) / "state" / "shard.pt").write_bytes(b"123")
    (write_checkpoint(tmp_path, 30) / "state" / "shard.pt").unlink()
    (write_checkpoint(tmp_path, 40) / "COMPLETE").unlink()
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [10]
    assert require_continuable(tmp_path, SPEC).step == 10


def test_the_newest_is_continued_and_without_one_training_starts_afresh(tmp_path):
    assert require_continuable(tmp_path / "absent", SPEC) is None
    for step in (10, 100, 20):
        write_checkpoint(tmp_path, step)
    assert require_continuable(tmp_path, SPEC).step == 100


def restored(folder):
    """The step from which a run would continue, and the problems of newer checkpoints."""
    found, problems = newest_good(folder, SPEC)
    return (found.step if found else 0), problems


def test_a_damaged_shard_of_the_right_size_is_passed_over(tmp_path):
    write_checkpoint(tmp_path, 10)
    (write_checkpoint(tmp_path, 20) / "state" / "shard.pt").write_bytes(b"12x45")
    step, problems = restored(tmp_path)
    assert step == 10
    assert "step-00000020 is damaged (state/shard.pt)" in problems[0]


@pytest.mark.parametrize("is_ours", [True, False])
def test_every_worker_gathers_as_often_whatever_it_sees(tmp_path, monkeypatch, is_ours):
    write_checkpoint(tmp_path, 10)
    gathered = []
    monkeypatch.setattr(checkpoint, "_is_ours", lambda file: is_ours)
    monkeypatch.setattr(checkpoint, "gathered", lambda part: gathered.append(part) or [part])
    [found] = complete_checkpoints(tmp_path)
    assert bool(checkpoint.damage(found)) is not is_ours
    assert len(gathered) == 1, "a worker that gathers less often than the others lets them wait for ever"


def test_training_starts_afresh_if_all_are_damaged(tmp_path):
    (write_checkpoint(tmp_path, 20) / "state" / "shard.pt").write_bytes(b"12x45")
    assert restored(tmp_path)[0] == 0


def test_a_pickle_that_others_may_write_is_not_read(tmp_path):
    write_checkpoint(tmp_path, 10)
    (write_checkpoint(tmp_path, 20) / "state" / "shard.pt").chmod(0o666)
    (write_checkpoint(tmp_path, 30) / "COMPLETE").chmod(0o666)
    linked = write_checkpoint(tmp_path, 40) / "state" / "shard.pt"
    linked.unlink()
    elsewhere = tmp_path / "elsewhere.pt"
    elsewhere.write_bytes(b"12345")
    linked.symlink_to(elsewhere)
    step, problems = restored(tmp_path)
    assert step == 10
    assert [problem.count("is not this user's alone") for problem in problems] == [1, 1, 1]


def test_a_checkpoint_without_digests_is_not_read(tmp_path):
    folder = write_checkpoint(tmp_path, 10)
    content = json.loads((folder / "COMPLETE").read_text())
    del content["digests"]
    write_json(folder / "COMPLETE", content)
    assert restored(tmp_path)[0] == 0


@pytest.mark.parametrize(
    "spec",
    [CheckpointSpec("identity", 2, 3), CheckpointSpec("other", 2, 2)],
    ids=["zero_stage", "identity"],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, spec, request):
    write_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match=f"written with {request.node.callspec.id}="):
        require_continuable(tmp_path, spec)


def test_a_checkpoint_of_another_number_of_workers_is_continued(tmp_path):
    write_checkpoint(tmp_path, 10)
    found, problems = newest_good(tmp_path, replace(SPEC, world_size=5))
    assert (found.step, found.spec.world_size, problems) == (10, 2, [])


def test_a_given_checkpoint_may_be_of_any_run_but_is_complete_and_undamaged(tmp_path):
    folder = write_checkpoint(tmp_path, 10, CheckpointSpec("of another run", 2, 2))
    assert given_checkpoint(str(folder), SPEC).step == 10
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        given_checkpoint(str(tmp_path / "step-00000011"), SPEC)
    with pytest.raises(ValueError, match="written with zero_stage=2, this run has 3"):
        given_checkpoint(str(folder), replace(SPEC, zero_stage=3))
    (folder / "state" / "shard.pt").write_bytes(b"12x45")
    with pytest.raises(ValueError, match="is damaged"):
        given_checkpoint(str(folder), SPEC)


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"n": 1})
    write_json(tmp_path / "a.json", {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 2}


def test_a_given_checkpoint_leaves_something_to_train(tmp_path, packs_file):
    config = TrainConfig(max_steps=10, resume_from=str(write_checkpoint(tmp_path, 10, replace(SPEC, world_size=1))))
    one = TrainJob(config, "student", str(tmp_path), [packs_file], "digest", "identity")
    with pytest.raises(ValueError, match="is at step 10, and this run has 10 steps; give an earlier checkpoint"):
        loop._given(one, PackStore(one.files))
    more = replace(one, config=config.model_copy(update={"max_steps": 11}))
    assert loop._given(more, PackStore(one.files)).step == 10


@pytest.mark.slow
def test_a_restored_engine_goes_on_as_if_nothing_had_happened(job, tmp_path):
    store = PackStore(job.files)
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        for step in (0, 1):
            trainer.step(step)
        save_checkpoint(engine, tmp_path, 2, job.spec)
        expected = [trainer.step(step) for step in (2, 3)]
    found, problems = newest_good(tmp_path, job.spec)
    assert (found.step, problems) == (2, [])
    with loaded(job, found) as (engine, noise):
        trainer = Trainer(job, engine, noise, store)
        got = [trainer.step(step) for step in (2, 3)]
    assert [step.loss for step in got] == [step.loss for step in expected]
    assert [step.grad_norm for step in got] == pytest.approx([step.grad_norm for step in expected], rel=1e-6)


@pytest.mark.slow
def test_old_checkpoints_are_removed_and_an_unfinished_one_is_replaced(job, tmp_path):
    with loaded(job) as (engine, _):
        (tmp_path / "step-00000003").mkdir()
        (tmp_path / "step-00000003" / "half").write_text("")
        for step in (1, 2, 3):
            save_checkpoint(engine, tmp_path, step, job.spec, keep=2)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [2, 3]
    assert not (tmp_path / "step-00000003" / "half").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_updates_nothing(job, monkeypatch):
    with loaded(job) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        before = gathered_weights(engine.module)
        sums = iter([float("nan")])
        whole = trainer_module.summed_loss
        monkeypatch.setattr(trainer_module, "summed_loss", lambda *args: whole(*args) * next(sums, 1.0))
        with pytest.raises(trainer_module.NotFiniteError, match="loss at step 0 is nan, and nothing was updated"):
            trainer.step(0)
        for name, weight in gathered_weights(engine.module).items():
            assert torch.equal(weight, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_of_each_precision_gives_one_curve(job, precision):
    losses = []
    for stage in (0, 1, 2, 3):
        config = job.config.model_copy(update={"zero_stage": stage, "precision": precision})
        one = replace(job, config=config)
        with loaded(one) as (engine, noise):
            trainer = Trainer(one, engine, noise, PackStore(job.files))
            losses.append([trainer.step(step).loss for step in range(3)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5 if precision == "fp32" else 2e-3)


@pytest.mark.slow
def test_the_head_in_parts_gives_the_same_step_where_its_weight_is_sharded(job, monkeypatch):
    steps = []
    for limit in (1 << 30, 20 * 49152 * 16):
        monkeypatch.setattr(chunked_loss, "LOGITS_BYTES", limit)
        with loaded(job) as (engine, noise):
            trainer = Trainer(job, engine, noise, PackStore(job.files))
            steps.append([trainer.step(step) for step in range(2)])
    for whole, parts in zip(*steps, strict=True):
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


@pytest.mark.slow
def test_the_best_weights_are_exported_and_training_stops_without_improvement(job, tmp_path, monkeypatch):
    config = job.config.model_copy(
        update={"evaluate_every_steps": 1, "validation_share": 0.2, "patience": 2, "max_steps": 9}
    )
    one = replace(job, folder=str(tmp_path), config=config)
    (tmp_path / "checkpoints").mkdir()
    exported, losses = {}, iter([3.0, 1.0, 2.0, 1.5])
    evaluate = trainer_module.Trainer.evaluate

    def evaluated(self):
        exported[len(exported) + 1] = gathered_weights(self._engine.module)
        quiet = evaluate(self)
        assert quiet["validation_loss"] == pytest.approx(quiet["quiet_loss"], rel=0.1)
        return quiet | {"validation_loss": next(losses)}

    monkeypatch.setattr(trainer_module.Trainer, "evaluate", evaluated)
    loop.train_worker({"job": one})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["validation_loss"] for line in lines] == [3.0, 1.0, 2.0, 1.5]  # no better loss twice
    assert all(0 < line["goodput"] <= 1 and line["model_flops_per_second"] > 0 for line in lines)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in exported[2].items():
        assert torch.equal(dict(student.named_parameters())[name], weight), name
    summary = json.loads((tmp_path / "checkpoints" / "exported.json").read_text())
    notes = summary["notes"]
    assert summary["best_step"] == 2
    assert "stopped after 4 of 9 steps" in notes[0]
    assert "exported the weights of step 2 of 4, with the lowest validation loss 1.0000" in notes[1]


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_first_and_goes_on_from_there(job, tmp_path):
    one = replace(job, folder=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "stop").touch()
    loop.train_worker({"job": one})
    assert [found.step for found in complete_checkpoints(tmp_path / "checkpoints")] == [1]
    assert not (tmp_path / "checkpoints" / "exported.json").exists()
    (tmp_path / "checkpoints" / "stop").unlink()
    other = replace(job, folder=str(tmp_path / "other"), identity="of another run")
    given = str(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    loop.train_worker({"job": replace(other, config=job.config.model_copy(update={"resume_from": given}))})
    loop.train_worker({"job": one})
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (tmp_path, tmp_path / "other")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == losses[0][1:]
