"""The function as a PyTorch operator: opcheck, compilation, checkpointing, autocast, export, threads, memory."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention, operator
from kernels.hyper_attention.cpu import attention as cpu_attention
from kernels.hyper_attention.plan import causal_local
from kernels.hyper_attention.plan.choose_segments import choose_segments
from tests.kernels.hyper_attention.attention_samples import plan_of

PAPER = HyperAttentionConfig(block_size=8, num_samples=6, num_projections=3, leaf=16, exact_below=16)
LOCAL = HyperAttentionConfig(mode="causal_local", choice="means", window=20, segment=8, num_sinks=3, exact_below=16)
NOMINATE = HyperAttentionConfig(
    mode="causal_local", choice="nominated", window=20, segment=16, num_sinks=3, exact_below=16
)
MODES = pytest.mark.parametrize(
    ("config", "causal"),
    [(PAPER, False), (PAPER, True), (LOCAL, True), (NOMINATE, True)],
    ids=["full", "causal", "local", "nominated"],
)
IDS = torch.tensor([[0] * 40 + [1] * 20 + [-1] * 4])


def inputs(T=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T)
    shapes = ((1, 4, T, 16), (1, 2, T, 16), (1, 2, T, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@MODES
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_opcheck(config, causal, ids):
    q, k, v = inputs()
    rest = (causal, 0.25, config.to_json(), 16)
    torch.library.opcheck(operator.forward, (q, k, v, ids, *rest))
    detached = [x.detach() for x in (q, k, v)]
    out, lse, chosen = operator.forward(*detached, ids, *rest)
    for grad_lse in (None, lse.masked_fill(lse.isinf(), 0.0)):
        arguments = (out, grad_lse, *detached, out, lse, chosen, ids, *rest)
        torch.library.opcheck(operator.backward, arguments, test_utils=("test_schema", "test_faketensor"))


@MODES
def test_a_full_graph_gives_the_same_bits(config, causal):
    def loss(q, k, v, ids):
        out, lse = hyper_attention(q * 2, k, v, causal, config=config, document_ids=ids, return_lse=True)
        return (out * out).sum() + lse.masked_fill(lse.isinf(), 0.0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (64, 61):
        tensors, ids = inputs(T), IDS[:, :T]
        eager = loss(*tensors, ids)
        mine = compiled(*tensors, ids)
        assert torch.equal(mine, eager)
        for a, b in zip(torch.autograd.grad(mine, tensors), torch.autograd.grad(eager, tensors), strict=True):
            assert torch.equal(a, b)


def test_it_exports():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return hyper_attention(q, k, v, True, config=LOCAL)

    tensors = [x.detach() for x in inputs()]
    program = torch.export.export(Layer(), tuple(tensors))
    assert "hyper_attention.forward" in program.graph_module.code
    assert torch.equal(program.module()(*tensors), Layer()(*tensors))


def test_segments_are_chosen_once_a_step(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return choose_segments(*arguments)

    monkeypatch.setattr(causal_local, "choose_segments", counted)
    tensors = inputs()
    hyper_attention(*tensors, True, config=LOCAL).sum().backward()
    assert len(calls) == 1
    assert all(x.grad.isfinite().all() for x in tensors)


@MODES
def test_checkpointing_changes_no_bit(config, causal):
    def layer(q, k, v):
        return hyper_attention(q, k, v, causal, config=config).square().sum()

    tensors = inputs()
    plain = torch.autograd.grad(layer(*tensors), tensors)
    again = torch.autograd.grad(checkpoint(layer, *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@MODES
def test_inference_mode_changes_no_bit(config, causal):
    tensors = inputs()
    with torch.inference_mode():
        inferred = hyper_attention(*tensors, causal, config=config)
    assert torch.equal(inferred, hyper_attention(*tensors, causal, config=config))


@MODES
def test_autocast_gives_its_dtype(config, causal):
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = hyper_attention(q, k.half(), v, causal, config=config)
    assert out.dtype == torch.bfloat16
    narrow = (x.to(torch.bfloat16) for x in (q, k.half(), v))
    assert torch.equal(out, hyper_attention(*narrow, causal, config=config))
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


def test_short_inputs_take_torch_attention():
    q, k, v = inputs()
    out = hyper_attention(q, k, v, True)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_only_needed_gradients_are_given():
    q, k, v = inputs()
    hyper_attention(q, k.detach(), v.detach(), True, config=PAPER).sum().backward()
    assert q.grad is not None
    _, lse = hyper_attention(q, k, v, True, config=PAPER, return_lse=True)
    grad_q, grad_v = torch.autograd.grad(lse.sum(), (q, v))
    assert grad_q.any()
    assert not grad_v.any()


@MODES
def test_two_threads_give_the_bits_of_one(config, causal):
    tensors, threads = inputs(), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        out = hyper_attention(*tensors, causal, config=config)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def step(q, k, v, causal, config):
    """Run the operator's work outside the operator, as a dispatch mode sees neither its inside nor other threads."""
    plan = plan_of(q, k, causal, config)
    out, lse = cpu_attention.forward(q, k, v, plan, 0.25)
    cpu_attention.backward(out, lse, q, k, v, out, lse, plan, 0.25)


@MODES
def test_memory_is_linear(config, causal, monkeypatch):
    """The largest tensor of a step, recorded at dispatch, grows linearly with the number of tokens."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sizes = {"block_size": 32, "num_samples": 32, "leaf": 64, "window": 64, "exact_below": 64, "segment": 32}
    config = HyperAttentionConfig(mode=config.mode, choice=config.choice, **sizes)
    largest = {}
    for T in (1024, 4096):
        tensors = [x.detach() for x in inputs(T)]
        with Largest() as seen:
            step(*tensors, causal, config)
        largest[T] = seen.elements
        assert seen.calls > 100
    assert largest[4096] <= 6 * largest[1024]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    elements = calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes())
        return result
