"""The estimator on a GPU, in Triton: rows are gathered through the sort order, and each result has one owner.

Forward: one launch for the band, the sinks and the pooled keys; then one for each level over all its segments, heads
and batches, or for each look-back. Each starts from what the earlier ones left. Backward: delta; for each launch of the
forward pass one that owns dQ and one that owns dK and dV; and for the pooled and the sampled keys, which few programs
own and many queries read, a launch of several programs to a tile, whose results are summed. No atomics, no copy to the
host, no sorted copy of Q, K or V: the same inputs give the same bits.

Look-back by means has M launches, one for each chosen segment of a query. Each reads and writes the output between
them, and a segment that most queries choose has one program for its dK and dV: correct, but not yet the fastest form.

Results between launches are fp32; the last launch writes every row, in the dtype of the inputs. A query or key that no
band reads is in one level at most (save for keys when there are fewer queries): what is uninitialised is not read.

Shape letters: B batch, Hq query heads, Hk key heads, T queries, S keys, D head size.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from kernels.hyper_attention.gpu.backward import Extra, Queries, delta_kernel
from kernels.hyper_attention.gpu.parts import Part, drawn_keys, parts_of, row_of_slot, segment_of_token
from kernels.hyper_attention.gpu.tiles import Keys, ranges, rows, table
from kernels.hyper_attention.gpu.tuning import launch, padded
from kernels.hyper_attention.plan.tables import KeyPlan

_LOG2E = 1.4426950408889634
_PROGRAMS = 1024
_PIECE_ROWS = 1024


def forward(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output of the estimator and its log-sum-exp.

    Args:
        q: [B, Hq, T, D], fp16, bf16 or fp32, any strides.
        k: [B, Hk, S, D], Hq a multiple of Hk.
        v: [B, Hk, S, D].
        plan: for these shapes, on the device of q.
        scale: factor of the logits.

    Returns:
        Output [B, Hq, T, D] in the dtype of q and LSE [B, Hq, T], fp32; 0 and -inf where a query reads no key.

    Raises:
        ValueError: the dtype is fp64.
    """
    if q.dtype == torch.float64:
        raise ValueError("hyper_attention: q is torch.float64; on a GPU it must be fp16, bf16 or fp32")
    heads, T = q.shape[1:3]
    out = q.new_empty(q.shape)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    with _on(q.device):
        parts = parts_of(k, v, plan)
        left = torch.empty_like(out, dtype=torch.float32) if len(parts) > 1 else out
        for i, part in enumerate(parts):
            last = part is parts[-1]
            order = None if part.query_order is None else table(part.query_order)
            launch(
                "forward", part.name, T, heads, q, rows(q), rows(left) if i else None, rows(out if last else left),
                table(lse), order, part.near, part.sinks, part.pooled, part.draws, scale * _LOG2E,
                heads, heads // k.shape[1], T, chosen=_chosen(part.pooled), everything=last,
            )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: KeyPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the estimator, in the dtypes of q, k and v.

    Args:
        grad_out: [B, Hq, T, D].
        grad_lse: [B, Hq, T] or None if the LSE was not used.
        q, k, v, plan, scale: as in `forward`.
        out, lse: what `forward` returned.
    """
    with _on(q.device):
        parts = parts_of(k, v, plan)
        queries = _queries(grad_out, grad_lse, q, out, lse)
        grad_q = _query_gradient(q, k, queries, parts, plan, scale * _LOG2E)
        return grad_q, *_key_gradients(q, k, v, queries, parts, plan, scale * _LOG2E)


def _queries(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor) -> Queries:
    """What the backward kernels read of the queries, in the order of positions."""
    B, heads, T, D = q.shape
    delta, finite = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    given = None if grad_lse is None else table(grad_lse)
    delta_kernel[triton.cdiv(T, 64) * heads, B](
        rows(grad_out), rows(out), given, table(lse), table(delta), table(finite), heads, T, D=D, BM=64, BD=padded(D)
    )
    return Queries(rows(q), rows(grad_out), table(finite), table(delta), None)


def _query_gradient(q: Tensor, k: Tensor, queries: Queries, parts: list[Part], plan: KeyPlan, scale: float) -> Tensor:
    heads, T = q.shape[1:3]
    grad = q.new_empty(q.shape)
    left = torch.empty_like(grad, dtype=torch.float32) if len(parts) > 1 else grad
    seen = ranges(plan.band.start, plan.band.stop)
    for i, part in enumerate(parts):
        last = part is parts[-1]
        launch(
            "query_gradient", part.name, T, heads, q, _in_order(queries, part), rows(left) if i else None,
            rows(grad if last else left), seen if i else None, part.near, part.sinks, part.pooled, part.draws, scale,
            heads, heads // k.shape[1], T, chosen=_chosen(part.pooled), everything=last,
        )  # fmt: skip
    return grad


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, queries: Queries, parts: list[Part], plan: KeyPlan, scale: float
) -> tuple[Tensor, Tensor]:
    heads, S = k.shape[1:3]
    groups, same_length = q.shape[1] // heads, q.shape[2] == S
    grads = k.new_empty(k.shape), v.new_empty(v.shape)
    several = len(parts) > 1
    left = [torch.empty_like(grad, dtype=torch.float32) if several else grad for grad in grads]
    seen = ranges(*plan.band.readers) if same_length else None
    for i, part in enumerate(parts):
        last, into = part is parts[-1], _in_order(queries, part)
        extra = _extra(q, k, v, into, part, plan, scale)
        target = tuple(rows(x) for x in (grads if last else left))
        launch(
            "key_gradient", part.name, S, heads, k, into, part.near._replace(ranges=part.readers), part.sink_readers,
            tuple(rows(x) for x in left) if i else None, target, seen if i else None, extra, scale, heads, groups, S,
            everything=last or not (i or same_length),
        )  # fmt: skip
    return grads


def _extra(q: Tensor, k: Tensor, v: Tensor, queries: Queries, part: Part, plan: KeyPlan, scale: float) -> Extra | None:
    """The gradients of the part's pooled or sampled keys; many queries read each, so several programs share a tile."""
    if part.pooled is not None:
        pooled = plan.pooled
        assert pooled is not None and part.means is not None  # noqa: S101, PT018 - for the type checker
        keys = part.pooled._replace(ranges=ranges(*pooled.band.readers))
        count, share = pooled.start.shape[1], 1.0 / (pooled.length - pooled.skip)[:, None, :, None]
        row, most = segment_of_token(pooled, k.shape[2]), 1
    elif part.level_draws is not None:
        keys = drawn_keys(k, v, part.level_draws, q.shape[1] // k.shape[1])
        count = part.level_draws.place.shape[2:].numel()
        share, row, most = None, row_of_slot(part.level_draws, k.shape[2]), 2
    else:
        return None
    (B, heads, _, D), groups = k.shape, q.shape[1] // k.shape[1]
    pieces = max(1, min(16, _PROGRAMS // (triton.cdiv(count, 64) * B * heads), q.shape[2] // _PIECE_ROWS))
    grads = [torch.empty(pieces, B, heads, count, D, dtype=torch.float32, device=k.device) for _ in range(2)]
    launch(
        "key_gradient", "compact", count, heads, k, queries, keys, None, None,
        tuple(rows(x.flatten(0, 1)) for x in grads), None, None, scale, heads, groups, count,
        pieces=pieces, chosen=_chosen(keys), everything=True,
    )  # fmt: skip
    sums = [x.sum(0) if pieces > 1 else x[0] for x in grads]
    if share is not None:
        sums = [x * share for x in sums]
    return Extra(table(row), rows(sums[0]), rows(sums[1]), most)


def _chosen(keys: Keys | None) -> int:
    """Keys of its ranges that each query leaves out."""
    return 0 if keys is None or keys.hidden is None else keys.hidden.count.value


def _in_order(queries: Queries, part: Part) -> Queries:
    return queries if part.query_order is None else queries._replace(order=table(part.query_order))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
