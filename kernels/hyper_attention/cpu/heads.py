"""The key heads of a batch, one by one; no two heads write the same memory, so each can run on its own thread.

Shape letters: B batch, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head size.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A key head of one row of the batch, with the query heads that read it; views, contiguous.

    Attributes:
        row: its row of the batch and of the plan's tables.
        key: which key head it is.
        queries: its query heads.
        q: [G, T, D].
        k: [S, D].
        v: [S, D].
        out: [G, T, D], output so far, or of the whole softmax in the backward pass.
        lse: [G, T], its log-sum-exp.
        scale: factor of the logits.
    """

    row: int
    key: int
    queries: slice
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float

    def of_queries(self, x: Tensor) -> Tensor:
        """View [G, T, ...] of x [B, Hq, T, ...]."""
        return x[self.row, self.queries]

    def of_key(self, x: Tensor) -> Tensor:
        """View [S, ...] of x [B, Hk, S, ...]."""
        return x[self.row, self.key]


@dataclass(frozen=True)
class Gradients:
    """Gradients of a head: that of its output, [G, T, D], and those that are summed, of the shapes of q, k and v."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def heads_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> list[Head]:
    """The heads of q [B, Hq, T, D], k and v [B, Hk, S, D], out [B, Hq, T, D] and lse [B, Hq, T], all contiguous."""
    group = q.shape[1] // k.shape[1]
    return [
        Head(row, key, queries, q[row, queries], k[row, key], v[row, key], out[row, queries], lse[row, queries], scale)
        for row in range(k.shape[0])
        for key in range(k.shape[1])
        for queries in [slice(key * group, (key + 1) * group)]
    ]
