"""The exported student, from one in-process worker with a real DeepSpeed engine."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from operators.train import loop
from operators.train.checkpoint import complete_checkpoints
from operators.train.engine import loaded
from operators.train.export import ExportError, export_student
from operators.train.pack_order import PackStore
from operators.train.trainer import Trainer


@pytest.mark.slow
def test_the_exported_student_is_the_engine_s_model(job, tmp_path):
    with loaded(job) as (engine, noise):
        Trainer(job, engine, noise, PackStore(job.files)).step(0)
        export_student(engine, job.student, tmp_path)
        tokens = torch.tensor([PackStore(job.files).pack(0).input_ids])
        engine.eval()
        with torch.no_grad():
            expected = engine(input_ids=tokens, use_cache=False).logits
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(job.student)(input_ids=tokens).logits
        got = exported(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, base, rtol=1e-5, atol=1e-6)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).chat_template
        == AutoTokenizer.from_pretrained(job.student).chat_template
    )
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    assert next(exported.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_a_failed_export_keeps_the_training_and_the_next_attempt_only_exports(job, tmp_path, monkeypatch):
    blocked = replace(job, folder=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "tokenizer.json").mkdir()  # a folder where a file is to be written
    with pytest.raises(ExportError, match="cannot be written"):
        loop.train_worker({"job": blocked})
    assert "cannot be written" in loop.read_failure(tmp_path)
    assert [found.step for found in complete_checkpoints(tmp_path / "checkpoints")] == [4]
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "checkpoints" / "failed.json").unlink()
    monkeypatch.setattr(loop.Trainer, "step", None)  # no step is trained again
    loop.train_worker({"job": blocked})
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert (tmp_path / "checkpoints" / "exported.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_the_generation_config_of_an_export_can_be_saved_and_has_its_stop_tokens(job, tmp_path):
    with loaded(job) as (engine, _):
        settings = engine.module.generation_config
        settings.temperature, settings.top_p, settings.do_sample, settings.eos_token_id = 0.9, 0.6, False, 0
        changed = export_student(engine, job.student, tmp_path)
    exported = GenerationConfig.from_pretrained(tmp_path)
    assert changed == "do_sample: true"
    assert (exported.do_sample, exported.temperature) == (True, 0.9)
    assert exported.eos_token_id == [2, 0]  # the learnt end of turn, and the model's own end
