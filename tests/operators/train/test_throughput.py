"""The model FLOPs and peaks from which MFU is computed."""

import pytest
import torch
import transformers as tf

from operators.student.packed_loss import load_trainable
from operators.train.lora import LoraConfig, with_adapters
from operators.train.throughput import ModelCost, model_cost, peak_flops, peak_of


def test_a_tied_embedding_counts_once_as_the_head(tiny_model):
    model = load_trainable(tiny_model, torch.float32)
    cost = model_cost(model)
    assert cost.per_token == 6 * sum(each.numel() for each in model.parameters())
    assert cost.per_square == 6 * 2 * 64
    frozen = model_cost(with_adapters(model, LoraConfig(r=4), seed=0))
    assert 4 / 6 < frozen.per_token / cost.per_token < 0.68


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        (tf.Qwen3MoeConfig, "num_experts"),
        (tf.MixtralConfig, "num_local_experts"),
        (tf.DeepseekV3Config, "n_routed_experts"),
    ],
)
def test_of_experts_those_count_that_a_token_passes_through(kind, experts):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    more = {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    config = kind(**sizes, **heads, **more, num_experts_per_tok=2, **{experts: 8}, tie_word_embeddings=True)
    model = tf.AutoModelForCausalLM.from_config(config)
    of_experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    whole = sum(each.numel() for each in model.parameters())
    assert of_experts
    assert model_cost(model).per_token == 6 * (whole - of_experts + of_experts * 2 / 8)


def test_attention_is_counted_by_document():
    cost = ModelCost(per_token=10.0, per_square=1.0)
    assert cost.flops([4, 4]) == 80 + 32
    assert cost.flops([8]) == 80 + 64


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40S", 362e12),
        ("Unknown 9000", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, peak):
    assert peak_of(name) == peak


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu") is None
