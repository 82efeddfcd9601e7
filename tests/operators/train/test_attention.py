"""HyperAttention in training: exact if it covers everything, separate for each document of a pack, and it learns."""

import pytest
import ray
import torch
from pydantic import ValidationError

from operators.student.packed_documents import Pack
from operators.student.packed_loss import summed_loss
from operators.train.attention import configured_attention, hyper_attention_routes
from operators.train.engine import load_student
from operators.train.train import TrainConfig, train

EXACT = TrainConfig(precision="fp32", max_steps=4, packs_per_step=4, learning_rate=1e-3, num_workers=1)
SMALL = {"window": 8, "num_sinks": 2, "lookback": 16, "segment": 16, "exact_below": 0}


LENGTHS = [600, 700]  # the window of a query grows by up to 256 tokens before it moves on


@pytest.fixture(scope="module")
def pack():
    tokens = torch.randint(100, 40_000, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [-100, *tokens[1:600], -100, *tokens[601:]]
    return Pack(tokens, labels, LENGTHS, [0, 1])


def hyper(**sizes: object) -> TrainConfig:
    return EXACT.model_copy(update={"attention": "hyper_attention", "hyper_attention": sizes})


def loss_and_gradient(model, config, pack):
    model.zero_grad()
    with configured_attention(model, config):
        loss = summed_loss(model, pack)
        loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad.clone()


def test_where_it_is_exact_loss_and_gradient_are_those_of_exact_attention(pack, tiny_model):
    model = load_student(tiny_model, EXACT)
    exact = loss_and_gradient(model, EXACT, pack)
    same = loss_and_gradient(model, hyper(exact_below=4096), pack)
    assert same[0] == pytest.approx(exact[0], rel=1e-5)
    torch.testing.assert_close(same[1], exact[1], rtol=1e-3, atol=1e-5)


def test_documents_of_a_pack_stay_apart(pack, tiny_model):
    model, config = load_student(tiny_model, EXACT), hyper(**SMALL)
    packed, _ = loss_and_gradient(model, config, pack)
    spans = [slice(0, 600), slice(600, 1300)]
    documents = [Pack(pack.input_ids[span], pack.labels[span], [span.stop - span.start], [0]) for span in spans]
    assert packed == pytest.approx(sum(loss_and_gradient(model, config, one)[0] for one in documents), rel=1e-5)
    assert packed != pytest.approx(loss_and_gradient(model, EXACT, pack)[0], rel=1e-7), "the window is too wide to tell"


def test_the_layers_are_those_of_the_configuration(pack, tiny_model):
    model = load_student(tiny_model, EXACT)
    losses = {
        layers: loss_and_gradient(model, hyper(**SMALL).model_copy(update={"hyper_attention_layers": layers}), pack)[0]
        for layers in ("all", "last:1", "first:1")
    }
    assert len(set(losses.values())) == 3


def test_an_unknown_size_is_named_with_those_there_are():
    with pytest.raises(ValidationError, match=r"hyper_attention: .*windows.*: no such key; there are mode, block_size"):
        TrainConfig(attention="hyper_attention", hyper_attention={"windows": 3})
    with pytest.raises(ValidationError, match="window is 0"):
        TrainConfig(attention="hyper_attention", hyper_attention={"window": 0})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_workers_train_with_it_as_the_configuration_says(packs_file, tiny_model, tmp_path):
    packs = ray.data.read_parquet(packs_file)
    config = hyper(**SMALL).model_copy(update={"cpus_per_worker": 0.5, "max_failures": 0, "zero_stage": 2})
    manifest = train(packs, config, tiny_model, str(tmp_path))
    assert manifest.attention == "hyper_attention"
    assert manifest.last_loss < manifest.first_loss


def test_the_report_says_where_hyper_attention_is_exact(tiny_model):
    model = load_student(tiny_model, EXACT)
    assert hyper_attention_routes(model, EXACT, [LENGTHS]) == []
    [exact] = hyper_attention_routes(model, hyper(exact_below=4096), [LENGTHS, [20]])
    assert exact.startswith("HyperAttention: the longest document has 700 tokens and takes the path ")
    assert "the longest document = 700 is at most exact_below = 4096" in exact
    [estimated] = hyper_attention_routes(model, hyper(**SMALL), [LENGTHS])
    assert "takes the path hyper_attention: the longest document = 700 is above exact_below = 0" in estimated
    [alone] = hyper_attention_routes(model, hyper(exact_below=4096), [[700], [20, 30]])
    assert "takes the path sdpa: S = 700 is at most" in alone


def test_the_report_tells_the_path_of_compiled_layers_and_of_long_packs(tiny_model, monkeypatch):
    monkeypatch.setattr("kernels.hyper_attention.routing._varlen", lambda q: object())
    model, config = load_student(tiny_model, EXACT), hyper(exact_below=1000)
    shared = {"compile": True, "sequence_parallel": 2}  # there the exchange, and attention with it, is not compiled
    for changed, path in (({}, "varlen"), ({"compile": True}, "hyper_attention"), (shared, "varlen")):
        [note] = hyper_attention_routes(model, config.model_copy(update=changed), [LENGTHS])
        assert f"takes the path {path}: the longest document = 700 is at most exact_below = 1000" in note
    [several] = hyper_attention_routes(model, config.model_copy(update={"packs_per_pass": 2}), [[700]])
    assert "takes the path varlen" in several
