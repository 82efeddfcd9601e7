"""Launches of a step on a GPU, counted without a GPU: torch operations other than views, and Triton launches."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.hyper_attention import HyperAttentionConfig
from tests.kernels.hyper_attention.gpu.interpreted import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="launches are not counted in the interpreter")
VIEWS = {
    "view", "slice", "select", "transpose", "unsqueeze", "expand", "detach", "alias", "split", "empty", "new_empty",
    "empty_strided", "as_strided", "permute", "squeeze", "_unsafe_view", "_reshape_alias", "t",
}  # fmt: skip
FORBIDDEN = {"sort", "topk", "nonzero", "_local_scalar_dense", "item", "_to_copy", "unique"}


class Launches(TorchDispatchMode):
    """Counts by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def launches(monkeypatch, kind, tokens, heads, documents, causal=True):
    """Launches of a forward and of a backward pass."""
    from triton.runtime.jit import JITFunction

    if kind == "nominated":
        from kernels.hyper_attention.gpu.local import launches as path

        config = HyperAttentionConfig(mode="causal_local", choice="nominated", segment=64, exact_below=256)
    else:
        from kernels.hyper_attention.gpu.paper import launches as path

        config = HyperAttentionConfig(exact_below=256)
    counts = []
    q, k, v = (torch.zeros(1, heads, tokens, 16) for _ in range(3))
    ids = None if documents == 1 else torch.arange(documents).repeat_interleave(tokens // documents)[None]
    with monkeypatch.context() as patch:
        modes = []
        patch.setattr(JITFunction, "run", lambda self, *a, **o: modes[-1].found.update([self.fn.__name__]))
        patch.setattr(torch, "_assert_async", lambda *a: modes[-1].found.update(["assert"]))
        if kind == "paper":  # projections are made once per configuration
            path._sides.cache_clear()
            modes.append(Launches())
            path.forward(q, k, v, ids, causal, config, 0.1)
        with Launches() as mode:
            modes.append(mode)
            out, lse, buffer = path.forward(q, k, v, ids, causal, config, 0.1)
        counts.append(mode.found)
        with Launches() as mode:
            modes.append(mode)
            path.backward(out, lse, q, k, v, out, lse, buffer, documents > 1, causal, config, 0.1)
        counts.append(mode.found)
    return counts


@pytest.mark.parametrize(("kind", "causal"), [("nominated", True), ("paper", True), ("paper", False)])
@pytest.mark.parametrize("documents", [1, 8])
def test_launches_do_not_grow(monkeypatch, kind, causal, documents):
    counts = [
        launches(monkeypatch, kind, tokens, heads, documents, causal)
        for tokens, heads in ((8192, 1), (8192, 8), (131072, 1))
    ]
    for forward, backward in counts:
        assert not FORBIDDEN & {*forward, *backward}
        # Documents add two launches: their bounds and the check of their order.
        limit = 6 if kind == "nominated" or documents == 1 else 8
        assert forward.total() <= limit, forward
        assert forward.total() + backward.total() <= 14 + (limit - 6) // 2, (forward, backward)
    assert len({(forward.total(), backward.total()) for forward, backward in counts}) == 1
