"""The noise that training adds for students that multiply their embeddings."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig

from kernels.neftune import batch_of_pack, neftune
from operators.student.packed_loss import load_trainable
from operators.train.config import TrainConfig
from operators.train.engine import loaded
from operators.train.noise import configured_noise, note_of


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("granite")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, embedding_multiplier=12.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_the_noise_is_divided_by_the_factor_also_where_zero_3_has_divided_the_weights(job, granite):
    with loaded(replace(job, student=granite)) as (engine, noise):
        assert noise.gain == 12
        assert "multiplies its embeddings by 12 after the noise" in note_of(noise)
        noise.set_batch(batch_of_pack([200, 56], [1, 2], 256, epoch=0))
        ids = torch.arange(256)[None]
        output = engine.module.get_input_embeddings()(ids)
        assert noise.l2_per_document().tolist() == pytest.approx([job.config.neftune_alpha / 3**0.5] * 2, rel=0.05)
        engine.module.eval()
        added = (output - engine.module.get_input_embeddings()(ids))[0].split([200, 56])
        assert [part.norm().item() * 12 for part in added] == pytest.approx([5 / 3**0.5] * 2, rel=0.05)


def test_nothing_is_measured_or_noted_without_noise_or_factor(granite, tiny_model):
    model = load_trainable(granite, torch.float32)
    with configured_noise(model, TrainConfig(neftune_alpha=0)) as noise:
        assert noise.gain == 1
    with configured_noise(load_trainable(tiny_model, torch.float32), TrainConfig()) as noise:
        assert (noise.gain, note_of(noise)) == (1, "")


def test_a_student_whose_noise_cannot_be_right_is_refused(monkeypatch):
    config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"train: train\.neftune_alpha: between its embeddings.*set train\.neft"):
        configured_noise(AutoModelForCausalLM.from_config(config), TrainConfig())


def test_a_gain_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="gain is 0"), neftune(torch.nn.Embedding(2, 2), 5.0, 0, gain=0):
        pass
