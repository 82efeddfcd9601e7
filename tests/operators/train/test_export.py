"""The exported student, from one in-process worker with a real DeepSpeed engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from operators.student.encode import load_tokenizer
from operators.train import export, loop
from operators.train.checkpoint import complete_checkpoints
from operators.train.engine import loaded
from operators.train.export import ExportError, export_student, stream_weights
from operators.train.pack_order import PackStore
from operators.train.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[3]
SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "experts held as one tensor": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
    "other experts": lambda: tf.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16
    ),
    "gpt2": lambda: tf.GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2),
}


def shapes(folder):
    """Name, shape and dtype of every weight in a folder."""
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: (tensor.shape, tensor.dtype) for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_streamed_into_the_files_that_save_pretrained_writes(family, process_group, tmp_path, monkeypatch):
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(FAMILIES[family]()).bfloat16().eval()
    before, after = tmp_path / "before", tmp_path / "after"
    fresh.save_pretrained(before)
    model = AutoModelForCausalLM.from_pretrained(before).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.config.save_pretrained(after)
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", 8000)
    problems = []
    stream_weights(model, after, problems)
    assert problems == []
    assert shapes(after) == shapes(before)
    assert len(list(after.glob("*.safetensors"))) > 2
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        got, expected = (one(input_ids=tokens).logits for one in (AutoModelForCausalLM.from_pretrained(after), model))
    assert torch.equal(got, expected)


def test_a_given_template_is_exported_and_else_the_student_s_own(process_group, tiny_model, own_template, tmp_path):
    engine = SimpleNamespace(module=AutoModelForCausalLM.from_pretrained(tiny_model))
    for given in ("", own_template):
        folder = tmp_path / ("given" if given else "own")
        export_student(engine, tiny_model, folder, chat_template=given)
        expected = given or load_tokenizer(tiny_model).chat_template
        assert AutoTokenizer.from_pretrained(folder).chat_template == expected
        assert (folder / "chat_template.jinja").read_text() == expected


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


@pytest.fixture(scope="module")
def of_two_workers(tiny_model, packs_file, tmp_path_factory):
    """What two ZeRO-3 workers exported; see `exporting.py`."""
    folder, model = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("model")
    settings = tf.AutoConfig.from_pretrained(tiny_model)
    settings.num_hidden_layers, settings.intermediate_size = 8, 16384
    AutoModelForCausalLM.from_config(settings).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("exporting.py"))]
    workers = [
        subprocess.Popen([*script, str(rank), folder, model, packs_file], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    ended = [worker.communicate(timeout=400)[1].decode()[-2000:] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    return folder, model


@pytest.mark.slow
def test_no_worker_holds_a_model_while_two_zero_3_workers_write_it_in_parts(of_two_workers):
    folder, model = of_two_workers
    whole = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    largest = 49152 * 64 * 4  # of the embedding
    for worker in json.loads((folder / "measured.json").read_text()):
        assert max(worker["all"], worker["merged"]) < 3 * largest < whole / 2, worker
        assert worker["adapters"] < largest, worker
    assert shapes(folder / "all") == shapes(folder / "merged") == shapes(model)
    sizes = sorted(file.stat().st_size for file in (folder / "all").glob("*.safetensors"))
    assert len(sizes) > 10
    assert sizes[-1] > largest
    assert sizes[-2] < 5_010_000, "only the embedding is larger than a file may be"
    index = json.loads((folder / "all" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"], "tied"
    assert not list((folder / "adapters").glob("model*"))


@pytest.mark.slow
def test_the_logits_of_the_parts_are_those_of_the_engine_with_adapters_merged_or_alone(of_two_workers, packs_file):
    folder, model = of_two_workers
    tokens = torch.tensor([PackStore([packs_file]).pack(0).input_ids])
    base = AutoModelForCausalLM.from_pretrained(model)
    students = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("all", "merged", "adapters")}
    students["apart"] = PeftModel.from_pretrained(base, folder / "merged" / "adapter")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(model)(input_ids=tokens).logits
        for name, student in students.items():
            expected = torch.load(folder / ("all.pt" if name == "all" else "adapted.pt"))
            assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4), "a step changes the student"
            torch.testing.assert_close(student.eval()(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
