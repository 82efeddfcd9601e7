"""What is written tensor by tensor is what safetensors and transformers read."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from operators.train.shards import ShardWriter

WEIGHTS = {
    "a.half": torch.randn(3, 5).bfloat16(),
    "b.scalar": torch.tensor(7, dtype=torch.int64),
    "c.not contiguous": torch.randn(8, 4).T,
    "d.parameter": nn.Parameter(torch.randn(50)),
    "e.bool": torch.tensor([True, False, True]),
    "f.empty": torch.empty(0, 2),
    "g.double": torch.randn(2, dtype=torch.float64),
}


def write(folder, weights, limit="5GB", planned=None):
    writer = ShardWriter(folder, planned or weights, limit)
    for name, tensor in weights.items():
        writer.write(name, tensor)
    writer.finish()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("limit", "number"), [("5GB", 1), (50, 4)])
def test_every_tensor_is_read_as_it_was_written_in_any_order(tmp_path, limit, number):
    (tmp_path / "model-00009-of-00009.safetensors").write_text("of an earlier attempt")
    write(tmp_path, dict(reversed(WEIGHTS.items())), limit, WEIGHTS)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == number
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == WEIGHTS[name].dtype
        assert torch.equal(tensor, WEIGHTS[name]), name
    if number == 1:
        assert files(tmp_path) == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": 15 + 1 + 32 + 50 + 3 + 2,
        "total_size": 30 + 8 + 128 + 200 + 3 + 16,
    }
    for shard in shards:
        names = {name for name, file in index["weight_map"].items() if file == shard.name}
        assert names == load_file(shard).keys()
        assert sum(WEIGHTS[name].nbytes for name in names) <= limit or len(names) == 1


def test_transformers_loads_a_model_in_parts(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=100, **sizes)).bfloat16()
    model.config.save_pretrained(tmp_path)
    write(tmp_path, model.state_dict(), 8000)
    assert len(files(tmp_path)) > 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_what_was_not_planned_or_not_written_is_an_error_and_there_is_no_index(tmp_path):
    for weights, problem in [
        ({"a.half": WEIGHTS["a.half"]}, "6 weights were not written, such as b.scalar"),
        ({"x": WEIGHTS["a.half"]}, r"weight x is torch.bfloat16 \(3, 5\), planned was nothing"),
        (
            {"a.half": torch.zeros(5, 3)},
            r"weight a.half is torch.float32 \(5, 3\), planned was torch.bfloat16 \(3, 5\)",
        ),
    ]:
        with pytest.raises(ValueError, match=problem):
            write(tmp_path, weights, 100, WEIGHTS)
        assert not (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(ValueError, match="complex64, which safetensors cannot hold"):
        write(tmp_path, {"a": torch.zeros(2, dtype=torch.complex64)})
