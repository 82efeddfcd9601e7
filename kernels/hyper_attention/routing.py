"""Which path a call takes: torch's fastest exact attention, or HyperAttention where that is faster.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size, N documents.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.crossovers import Crossover, crossover
from kernels.hyper_attention.documents import PADDING

_CPU_EXACT_BELOW = 4096
# On Hopper cuDNN is the fastest, but torch tries flash attention first: 573 against 837 ms at 131072 tokens, d = 64.
# But cuDNN builds a plan for each new shape, which others saw take 0.4 s and more (modelscope/FunASR#3704,
# sgl-project/sglang#4650). That is worth it only where shapes recur, so lengths must be multiples of _CUDNN_STEP.
_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CUDNN_STEP = 1024


Path = Literal["sdpa", "varlen", "hyper_attention"]


@dataclass(frozen=True)
class Route:
    """What a call does.

    Attributes:
        path: "sdpa" (exact, one document a row), "varlen" (exact, packed documents) or "hyper_attention".
        exact_below: documents of at most this many tokens are exact, whatever the path.
        reason: why, in one sentence.
    """

    path: Path
    exact_below: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    *,
    config: HyperAttentionConfig | None = None,
    packed: bool = False,
    return_lse: bool = False,
    longest: int | None = None,
    compiled: bool = False,
) -> Route:
    """The path that `hyper_attention` takes for such a call, and why.

    Args:
        q, k, causal, config, return_lse: as in `hyper_attention`.
        packed: whether `document_ids` or `cu_seqlens` is given.
        longest: tokens of the longest document or run of padding, if packed; S if None.
        compiled: whether `torch.compile` traces the call.
    """
    config = config or HyperAttentionConfig()
    limit = exact_below(q, k, causal, config)
    tokens = longest if packed and longest is not None else k.shape[2]
    path = path_of(q, k, causal, limit, (lambda: tokens) if packed else None, return_lse, compiled)
    name, source = "the longest document" if packed else "S", _source(q, k, causal, config)
    why = f"{name} = {tokens} is {'above' if limit < tokens else 'at most'} {source}"
    if path == "sdpa":
        first = not compiled and _cudnn_first(q, k)
        why += "; " + ("cuDNN's kernel first, the fastest on Hopper" if first else "torch's choice of kernels")
    elif path == "varlen":
        why += "; flash attention of packed documents"
    elif limit >= tokens:
        why += "; HyperAttention's own kernels are exact there, and torch has none for such a call"
    return Route(path, limit, why)


def path_of(
    q: Tensor,
    k: Tensor,
    causal: bool,
    limit: int,
    longest: Callable[[], int] | None,
    return_lse: bool,
    compiled: bool = False,
) -> Path:
    """The path of a call whose documents of at most `limit` tokens are exact.

    With `return_lse` it is "hyper_attention": only that path gives a differentiable log-sum-exp.

    Args:
        longest: asks for the tokens of the longest document, if documents are packed; on a GPU the host waits for it.
    """
    T, S = q.shape[2], k.shape[2]
    if return_lse or (causal and T != S):
        return "hyper_attention"
    if longest is None:
        return "sdpa" if limit >= S else "hyper_attention"
    if compiled or _varlen(q) is None:
        return "hyper_attention"
    return "varlen" if limit >= S or longest() <= limit else "hyper_attention"


def longest_document(ids: Tensor) -> int:
    """Tokens of the longest document or run of padding; the host reads it once for each tensor of ids [B, T]."""
    return _offsets(ids)[1]


def exact_below(q: Tensor, k: Tensor, causal: bool, config: HyperAttentionConfig) -> int:
    """`config.exact_below` as a number."""
    if config.exact_below != "auto":
        return config.exact_below
    return _CPU_EXACT_BELOW if q.device.type != "cuda" else _row(q, k, causal, config).tokens


def _row(q: Tensor, k: Tensor, causal: bool, config: HyperAttentionConfig) -> Crossover:
    kind: str = config.choice if config.segment else "lsh"
    if config.mode == "paper":
        kind = f"paper {'causal' if causal else 'full'}"
    # Not torch.is_grad_enabled(): activation checkpointing may run the forward pass of a training step without
    # gradients, and that pass must take the same path.
    training = not torch.is_inference_mode_enabled()
    return crossover(_card(q.device), kind, q.shape[3], q.shape[1] // k.shape[1], training)


def _source(q: Tensor, k: Tensor, causal: bool, config: HyperAttentionConfig) -> str:
    """The limit and where it comes from, for `Route.reason`."""
    if config.exact_below != "auto":
        return f"exact_below = {config.exact_below}"
    if q.device.type != "cuda":
        return f"exact_below = {_CPU_EXACT_BELOW}, the default on a {q.device.type}"
    row, card = _row(q, k, causal, config), _card(q.device)
    known = "measured " + row.measured if row.measured else "expected, not measured"
    like = "" if row.architecture == card else f" of {row.architecture}, the longest known, since {card} has none"
    sizes = f"{row.kind}, d = {row.head_size}, {row.group} query heads a key head"
    return f"the crossover {row.tokens}{like} ({sizes}; {known})"


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Exact attention of one document a row by torch's fastest kernel, [B, Hq, T, D]."""
    with _fastest_first(q, k):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def packed_exact_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, causal: bool, scale: float) -> Tensor:
    """Exact attention inside each document, [B, Hq, T, D]; 0 on padding.

    The host reads the number of documents and the longest length, once for each tensor of ids.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hk, T, D], fp16 or bf16 on a GPU.
        ids: [B, T], -1 on padding.
    """
    (B, Hq, T, D), varlen = q.shape, _varlen(q)
    assert varlen is not None  # noqa: S101 - `path_of` has checked
    offsets, longest = _offsets(ids)
    flat = [x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q, k, v)]
    window = (-1, 0) if causal else (-1, -1)
    grouped = {"enable_gqa": True} if k.shape[1] != Hq else {}
    out = varlen(*flat, offsets, offsets, longest, longest, scale=scale, window_size=window, **grouped)
    out = out.view(B, T, Hq, D).transpose(1, 2)
    exact: Tensor = out.masked_fill((ids == PADDING)[:, None, :, None], 0.0)
    return exact


def _hopper(q: Tensor) -> bool:
    return q.device.type == "cuda" and _card(q.device) == "sm_90"


def _cudnn_first(q: Tensor, k: Tensor) -> bool:
    """Depends on shapes only, so that a recomputed forward pass takes the same kernel."""
    return _hopper(q) and q.shape[2] % _CUDNN_STEP == 0 and k.shape[2] % _CUDNN_STEP == 0


def _fastest_first(q: Tensor, k: Tensor) -> AbstractContextManager[Any]:
    if not torch.compiler.is_compiling() and _cudnn_first(q, k):
        return sdpa_kernel(_HOPPER, set_priority=True)
    return nullcontext()


def _varlen(q: Tensor) -> Any:
    """The function `varlen_attn` of torch, attention of packed documents, or None where it cannot run."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type != "cuda" or not half or q.shape[3] % 8 or torch.compiler.is_compiling():
        return None
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return None  # flash attention refuses older GPUs
    if torch.cuda.is_current_stream_capturing():
        return None  # it needs lengths on the host
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn


class _LastOffsets(NamedTuple):
    ids: "weakref.ref[Tensor]"
    version: int
    offsets: Tensor
    longest: int


_last: list[_LastOffsets] = []


def _offsets(ids: Tensor) -> tuple[Tensor, int]:
    """Offsets of the documents and runs of padding of all rows, int32 [N + 1], and the longest length.

    The result for the last `ids` is kept, because the layers of a model share their ids; not for a tensor made in
    inference mode, which does not tell whether it was changed since.
    """
    version = None if ids.is_inference() else ids._version
    for known in _last:
        if known.ids() is ids and known.version == version:
            return known.offsets, known.longest
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    offsets = torch.nn.functional.pad(first.flatten().nonzero().flatten(), (0, 1), value=ids.numel())
    longest, offsets = int(offsets.diff().max()), offsets.to(torch.int32)
    if version is not None:
        _last[:] = [_LastOffsets(weakref.ref(ids), version, offsets, longest)]
    return offsets, longest


@cache
def _card(device: torch.device) -> str:
    """Name of the device's architecture, as in the table; "gfx" for AMD."""
    if torch.version.hip:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
